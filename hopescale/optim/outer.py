"""The outer optimizer: groups, rates, cadences and one clip norm in front of the update rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.groups import assign_groups
from hopescale.config.schema import OptimConfig
from hopescale.optim.cadence import Cadence
from hopescale.optim.changes import WeightChanges, square_change
from hopescale.optim.early import EarlySums
from hopescale.optim.gate import StepGate
from hopescale.optim.layerwise import LayerwiseOptimizer
from hopescale.optim.replicated import ReplicatedAdamW
from hopescale.optim.schedule import learning_rate
from hopescale.optim.updater import RuleGroup, Updater
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.node_flat import NodeFlat


class OuterOptimizer:
    """Updates named parameters, each at its cadence, with the gradients of all ranks.

    It holds one updater for the groups with AdamW and one for the groups with rules for matrices, as far as there are
    such groups. Hooks accumulate all gradients in a single backward pass, which the first updater runs: ZeRO 2 and 3,
    which must see the end of their own backward passes, therefore allow no second updater.

    A step is: backward passes, `reduce(due(step))`, `grad_norms(...)`, and `step(step, norm)` or `discard()`. What is
    named to `expect` before the last backward pass, and this pass is said to be the last, begins to be summed in it. A
    parameter that is not due keeps accumulating and sends nothing. Low-precision parameters have a float32 master that
    alone is updated.

    Args:
        parameters: Parameters of this rank by name, each with a `ParameterSpec`.
        config: Rule, rates and groups.
        total_steps: Horizon of the schedule.
        cadences: Cadence of every parameter that is not updated at each step, by name.
        groups: Group of every parameter, as `assign_groups` returns it; may name parameters of other ranks. None
            assigns the parameters given.
        mesh: Ranks of this process; None is a process of its own.
        tied: Parameters that the first and the last pipeline stage both hold.
        updater: Constructor of the updater for the groups with AdamW; the others have a `LayerwiseOptimizer`.
        levels: Names of parameters that are reduced together and apart from the others.
        shared: Names of parameters by block whose weights replicas of a node share out; `updater` is told of them.

    Attributes:
        rate_factor: Factor on all learning rates of the schedule.
        dropped_at: Last step at which all gradients were dropped; what was sent before has no update.

    Raises:
        ConfigError: If a parameter is in no group or in two, or a group takes none, or a rule that cannot update it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        cadences: Mapping[str, Cadence],
        *,
        groups: Mapping[str, str] | None = None,
        mesh: Mesh | None = None,
        tied: Collection[str] = (),
        updater: Callable[..., Updater] = ReplicatedAdamW,
        levels: Collection[Collection[str]] = (),
        shared: Sequence[Collection[str]] = (),
    ):
        self.config, self.total_steps, self.mesh = config, total_steps, mesh or Mesh.alone()
        self.rate_factor, self.dropped_at = 1.0, 0
        self.parameters, self.tied = dict(parameters), [name for name in tied if name in parameters]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.groups = dict(groups or assign_groups(shapes, config.groups))
        self.cadences = {name: cadences.get(name, Cadence()) for name in self.parameters}
        self._sent_together = self._alike(levels)
        self._shared = shared
        self.updaters = self._make_updaters(updater, levels, shared)
        self._updater_of = {name: each for each in self.updaters for name in each.parameters}
        self._weights = {
            name: self._updater_of[name].norm_weight(name) * self._is_counted(name) for name in self.parameters
        }
        self._weights_of: dict[tuple[str, ...], Tensor] = {}
        self._expected: list[Sequence[str]] = []
        self._early = EarlySums()
        if self.mesh.dp_group.size() > 1:
            for name, parameter in self.parameters.items():
                # After the hook that adds the gradient to a sum.
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._early.arrive(name))

    def _alike(self, levels: Collection[Collection[str]]) -> list[list[str]]:
        """Return the parameters with a lag that are here, level by level, and those of no level."""
        late = [name for name, cadence in self.cadences.items() if cadence.lag]
        inside = {name for names in levels for name in names}
        parts = [*map(set, levels), set(late) - inside]
        return [[name for name in late if name in part] for part in parts]

    def _make_updaters(
        self,
        elementwise: Callable[..., Updater],
        levels: Collection[Collection[str]],
        shared: Sequence[Collection[str]],
    ) -> list[Updater]:
        groups, result = self._rule_groups(), []
        by_matrix = partial(LayerwiseOptimizer, config=self.config, levels=levels, shared=shared)
        if shared:
            elementwise = partial(elementwise, shared=shared)
        for make, chosen in (
            (partial(elementwise, eps=self.config.eps), [group for group in groups if group.rule == "adamw"]),
            (by_matrix, [group for group in groups if group.rule != "adamw"]),
        ):
            names = {name for group in chosen for name in group.members}
            members = {name: parameter for name, parameter in self.parameters.items() if name in names}
            if members:
                result.append(make(members, chosen, cadences=self.cadences, mesh=self.mesh))
        return result

    def _by_updater(self, names: Sequence[str]) -> Iterator[tuple[Updater, list[str]]]:
        """Yield each updater that has some of the parameters, with their names in the given order."""
        for updater in self.updaters:
            if part := [name for name in names if self._updater_of[name] is updater]:
                yield updater, part

    def _rule_groups(self) -> list[RuleGroup]:
        result = []
        for name, group in self.config.groups.items():
            members = tuple(parameter for parameter in self.parameters if self.groups[parameter] == name)
            decay = self.config.weight_decay if group.weight_decay is None else group.weight_decay
            betas = (group.betas or self.config.betas) if group.rule == "adamw" else None
            if members:
                result.append(RuleGroup(name, members, decay, betas, group.rule))
        return result

    def _is_counted(self, name: str) -> bool:
        """Whether this rank's part of a parameter enters sums over ranks: one of several equal copies does."""
        whole = self.parameters[name].spec.partition_dim is None
        return (not whole or self.mesh.tp_group.rank() == 0) and (name not in self.tied or self.mesh.is_first_stage)

    def peak_rates(self) -> dict[str, float]:
        """Return the highest learning rate of each group."""
        return self._scaled(self.config.lr)

    def rates(self, step: int) -> dict[str, float]:
        """Return the learning rate of each group at a step."""
        rate = learning_rate(step, self.config.lr, self.total_steps, self.config.schedule)
        return self._scaled(self.rate_factor * rate)

    def _scaled(self, rate: float) -> dict[str, float]:
        return {name: rate * self.config.groups[name].lr_scale for name in sorted({*self.groups.values()})}

    def due(self, step: int) -> list[str]:
        """Return the names of this rank's parameters that step `step` updates."""
        return [name for name, cadence in self.cadences.items() if self.is_due(cadence, step)]

    def is_due(self, cadence: Cadence, step: int) -> bool:
        """Tell whether step `step` updates parameters of a cadence: not if the sum that it waits for was dropped."""
        return cadence.is_due(step) and (not cadence.lag or step - cadence.lag > self.dropped_at)

    def expect(self, due: Sequence[Sequence[str]]) -> None:
        """Name the parameters that are due, in the parts in which `reduce` will be called, before backward passes."""
        self._expected = list(due)

    def backward(self, loss: Tensor, *, is_last: bool = False) -> None:
        """Run the backward pass of a micro batch; gradients are accumulated as they become complete.

        In the `is_last` of a step, what is expected begins to be summed over replicas.
        """
        if is_last:
            self._early.expect(self._expected_sums(), self.begin)
        self.updaters[0].backward(loss)
        if is_last:
            self._early.begin_rest()
            self._expected = []

    def _expected_sums(self) -> list[list[str]]:
        """Return the sums of what is expected, in about the order in which a backward pass completes them."""
        sums = [names for part in self._expected for each, own in self._by_updater(part) for names in each.sums_of(own)]
        place = {name: number for number, name in enumerate(self.parameters)}
        # What comes first in the model has its gradient last.
        return sorted(sums, key=lambda names: -min(place[name] for name in names))

    @torch.no_grad()
    def begin(self, names: Sequence[str]) -> None:
        """Begin a sum over replicas whose gradients are there."""
        self._updater_of[names[0]].begin(names)

    @torch.no_grad()
    def reduce(self, names: Sequence[str]) -> None:
        """Sum the accumulated gradients of due parameters over replicas, and over the stages that hold one together."""
        for name in self.tied:
            if name in names and self.mesh.embedding_group.size() > 1:
                dist.all_reduce(self.accumulated_grad(name), group=self.mesh.embedding_group)
        for updater, part in self._by_updater(names):
            updater.reduce(part)

    @torch.no_grad()
    def hold(self, names: Sequence[str]) -> None:
        """Let the gradients of parameters that are not due wait: with nodes they are summed inside each."""
        for updater, part in self._by_updater(names):
            updater.hold(part)

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of this rank's gradients of a parameter since its last update, to be changed in place."""
        return self._updater_of[name].accumulated_grad(name)

    def grad_norms(self, sets: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Return the global norm of the accumulated gradients of each set, of each the mean per step of its period.

        Called by all ranks with the same keys; a rank's part of a set may be empty. The norm of gradients that were not
        reduced tells only whether they are finite.
        """
        return dict(zip(sets, self._over_ranks(self.square_sums(sets)).sqrt().unbind(), strict=True)) if sets else {}

    def square_sums(self, sets: Mapping[str, Sequence[str]]) -> Tensor:
        """Return this rank's parts of the squares of the norms of some sets, `[len(sets)]` float32."""
        names = sorted({name for members in sets.values() for name in members})
        squares: dict[str, Tensor] = {}
        for updater, part in self._by_updater(names):
            squares |= zip(part, updater.square_norms(part).unbind(), strict=True)
        totals = [
            # A weight of 0 keeps what is not finite visible: 0 * inf is nan.
            sum(
                (squares[name] * (self._weights[name] / self.cadences[name].period ** 2) for name in members),
                self._zero(),
            )
            for members in sets.values()
        ]
        return torch.stack(totals)

    def running_squares(self, names: Sequence[str]) -> Tensor | None:
        """Return the squared norm of what due parameters with a lag gather already; None if there are none here."""
        late = [name for name in names if self.cadences[name].lag]
        squares = [updater.running_squares(part) for updater, part in self._by_updater(late)]
        return torch.stack(squares).sum() if squares else None

    def send(self, names: Sequence[str]) -> None:
        """Begin to sum over replicas what parameters with a lag have gathered, and let them gather on."""
        for updater, part in self._by_updater(names):
            updater.send(part)

    @torch.no_grad()
    def step(self, step: int, grad_norm: Tensor, gate: StepGate | None = None) -> None:
        """Update what is due at step `step`, with its gradients scaled to the clip norm by their global norm.

        Then the sums of periods that end with this step and have a lag leave. If the step may be bad, all of it goes
        through a gate: a bad one changes no weight and no state of a rule, and drops all gradients, as `discard` does.
        Who learns that it was bad calls `take_back` before the next update.
        """
        clip, names = self.config.grad_clip, self.due(step)
        scale = 1.0 if clip is None else (clip / (grad_norm + 1e-6)).clamp_max(1.0)
        periods = {self.cadences[name].period for name in names}
        of_period = {period: scale / period if self.config.accumulate == "mean" else scale for period in periods}
        scales = {name: of_period[self.cadences[name].period] for name in names}
        for updater, part in self._by_updater(names):
            updater.update(part, scales, self.rates(step), gate)
        if self.mesh.dp_group.size() > 2:
            # Sums of three and more replicas may differ between the stages in the last bit; the copies must not.
            for name in set(self.tied) & set(names):
                dist.broadcast(self.parameters[name].detach(), group=self.mesh.embedding_group, group_src=0)
        if gate is not None:
            used_up = {name for name in names if not self.cadences[name].moves}  # of others the wire leaves a rest
            for updater, part in self._by_updater(sorted(self.parameters.keys() - used_up)):
                updater.drop_if_bad(part, gate)
        for level in self._sent_together:
            if ended := [name for name in level if self.cadences[name].lag and self.cadences[name].ends(step)]:
                self.send(ended)

    @property
    def is_gated(self) -> bool:
        """Whether `step` takes a gate, of the parameters that are here: not if sums leave for a later step."""
        return not any(c.lag for c in self.cadences.values()) and all(each.is_gated for each in self.updaters)

    def take_back(self, step: int) -> None:
        """Take back what the host has noted of a bad step `step` that went through a gate: that it was an update."""
        for updater, part in self._by_updater(self.due(step)):
            updater.uncount(part)
        self.dropped_at = step

    def defer(self, names: Sequence[str]) -> None:
        """Let weights of parameters come from other replicas after `step` has returned.

        Whoever reads these parameters calls `settle` before. `weights`, `to_save` and `load` do.
        """
        for updater, part in self._by_updater(names):
            updater.defer(part)

    def settle(self, names: Sequence[str] | None = None) -> None:
        """Wait for weights of parameters that are on their way, of all if none are named."""
        for updater in self.updaters:
            updater.settle(names)

    @torch.no_grad()
    def discard(self, step: int) -> None:
        """Drop all gradients of step `step` and before, what slow parameters have gathered and what was sent too."""
        self.dropped_at = step
        for updater in self.updaters:
            updater.discard()

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return copies of the parts of float32 masters that are here."""
        return torch._foreach_clone(self._masters(names)) if names else []

    def _masters(self, names: Sequence[str]) -> list[Tensor]:
        masters: dict[str, Tensor] = {}
        for updater, part in self._by_updater(names):
            masters |= zip(part, updater.masters(part), strict=True)
        return [masters[name] for name in names]

    def change(self, names: Mapping[str, Sequence[str]], before: Mapping[str, Sequence[Tensor]]) -> WeightChanges:
        """Return the root mean square of the change of each set's masters since `masters` returned `before`.

        It is taken over all ranks; `names` are the parameters of each set that are here. The copies `before` become the
        differences.
        """
        sums = []
        for key, members in names.items():
            if not members:
                sums += [self._zero(), self._zero()]
                continue
            after = self._masters(members)
            count = sum(new.numel() * self._weights[name] for name, new in zip(members, after, strict=True))
            sums.append(square_change(before[key], after, self._norm_weights(tuple(members))))
            sums.append(torch.full_like(self._zero(), count))
        return WeightChanges(list(names), self._over_ranks(torch.stack(sums)) if sums else None)

    def _norm_weights(self, names: tuple[str, ...]) -> Tensor:
        """Return the weights of parameters in sums over ranks, which a host would wait for if it made them anew."""
        if names not in self._weights_of:
            self._weights_of[names] = torch.tensor([self._weights[name] for name in names], device=self._zero().device)
        return self._weights_of[names]

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(iter(self.parameters.values())).device)

    def _over_ranks(self, values: Tensor) -> Tensor:
        if self.mesh.world_group.size() > 1:
            dist.all_reduce(values, group=self.mesh.world_group)
        return values

    def holds_whole(self, name: str) -> bool:
        """Tell whether a parameter's state is of the whole, not of this rank's tensor-parallel slice."""
        return self._updater_of[name].holds_whole(name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters and the rules' state, by name; a rank returns what it alone has, or what all have."""
        return {name: tensor for updater in self.updaters for name, tensor in updater.state_dict().items()}

    def node_flats(self) -> list[tuple[str, NodeFlat]]:
        """Return the weights that replicas of a node share out, each with the name of a parameter in it."""
        return [flat for updater in self.updaters for flat in updater.node_flats()]

    def copies(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """Return the weights that are whole on every replica, and what this rank keeps of those that are not."""
        shared = {name for names in self._shared for name in names}
        whole = {name: parameter for name, parameter in self.parameters.items() if name not in shared}
        return whole, {name: flat.share for name, flat in self.node_flats()}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint takes from this rank, by parameter name."""
        self.settle()
        return {name: tensor for updater in self.updaters for name, tensor in updater.weights().items()}

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return of `weights` and `state_dict` what this rank writes to a checkpoint. All replicas call."""
        self.settle()
        weights, state = {}, {}
        for updater in self.updaters:
            own_weights, own_state = updater.to_save()
            weights |= own_weights
            state |= own_state
        return weights, state

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None) -> None:
        """Take over the tensors of `weights` and `state_dict`, after they have been filled.

        Each updater picks its own. Without `state` masters become the weights, as in a new run.
        """
        self.settle()
        for updater in self.updaters:
            updater.load(weights, state)

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters, in parts that add up over replicas."""
        return {name: tensor for updater in self.updaters for name, tensor in updater.sums().items()}

    def on_their_way(self, step: int, dropped_at: int) -> list[str]:
        """Return the parameters whose sum waits for its update after step `step`, if all up to a step were dropped."""
        return [name for name, each in self.cadences.items() if each.is_on_its_way(step, dropped_at)]

    def load_sums(self, sums: Mapping[str, Tensor], step: int = 0) -> None:
        """Take over the running sums after step `step`, in parts that add up over replicas in any way.

        A missing sum is zero; `dropped_at` has been set. All replicas call.
        """
        late = self.on_their_way(step, self.dropped_at)
        for updater in self.updaters:
            updater.load_sums(sums, late)
