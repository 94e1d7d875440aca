"""The outer optimizer: groups, rates, cadences and one clip norm in front of the update rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.groups import assign_groups
from hopescale.config.schema import OptimConfig
from hopescale.optim.cadence import Cadence
from hopescale.optim.composite import CompositeUpdater
from hopescale.optim.replicated import ReplicatedUpdater
from hopescale.optim.schedule import learning_rate
from hopescale.optim.sharded import LayerwiseUpdater
from hopescale.optim.updater import RuleGroup, Updater
from hopescale.parallel.mesh import Mesh


class OuterOptimizer:
    """Updates named parameters, each at its cadence, with the gradients of all ranks.

    A step is: backward passes, `reduce(due(step))`, `grad_norms(...)`, `step(step, norm)`. A parameter that is not due
    keeps gathering and sends nothing. Low-precision parameters have a float32 master that alone is updated.

    Args:
        parameters: Parameters of this rank by name, each with a `ParameterSpec`.
        config: Rule, rates and groups.
        total_steps: Horizon of the schedule.
        cadences: Cadence of every parameter that is not updated at each step, by name.
        groups: Group of every parameter, as `assign_groups` returns it; may name parameters of other ranks. None
            assigns the parameters given.
        mesh: Where this process stands; None is a process of its own.
        tied: Parameters that the first and the last pipeline stage both hold.
        updater: Makes the keeper of masters and state of the groups with AdamW; the others have a `LayerwiseUpdater`.

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
        updater: Callable[..., Updater] = ReplicatedUpdater,
    ):
        self.config, self.total_steps, self.mesh = config, total_steps, mesh or Mesh.alone()
        self.parameters, self.tied = dict(parameters), [name for name in tied if name in parameters]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.groups = dict(groups or assign_groups(shapes, config.groups))
        self.cadences = {name: cadences.get(name, Cadence()) for name in self.parameters}
        self.updater = self._make_updater(updater)
        self._weights = {name: self.updater.norm_weight(name) * self._is_counted(name) for name in self.parameters}

    def _make_updater(self, elementwise: Callable[..., Updater]) -> Updater:
        groups = self._rule_groups()
        kinds = (
            ([group for group in groups if group.rule == "adamw"], partial(elementwise, eps=self.config.eps)),
            ([group for group in groups if group.rule != "adamw"], partial(LayerwiseUpdater, config=self.config)),
        )
        made = []
        for chosen, make in kinds:
            names = {name for group in chosen for name in group.members}
            members = {name: parameter for name, parameter in self.parameters.items() if name in names}
            if members:
                made.append((make(members, chosen, cadences=self.cadences, mesh=self.mesh), list(members)))
        return made[0][0] if len(made) == 1 else CompositeUpdater(made)

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
        return self._scaled(learning_rate(step, self.config.lr, self.total_steps, self.config.schedule))

    def _scaled(self, rate: float) -> dict[str, float]:
        return {name: rate * self.config.groups[name].lr_scale for name in sorted({*self.groups.values()})}

    def due(self, step: int) -> list[str]:
        """Return the names of this rank's parameters that step `step` updates."""
        return [name for name, cadence in self.cadences.items() if cadence.is_due(step)]

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch."""
        self.updater.backward(loss)

    @torch.no_grad()
    def reduce(self, names: Sequence[str]) -> None:
        """Sum the accumulated gradients of due parameters over replicas, and over the stages that share one."""
        for name in self.tied:
            if name in names and self.mesh.embedding_group.size() > 1:
                dist.all_reduce(self.updater.accumulated_grad(name), group=self.mesh.embedding_group)
        self.updater.reduce(names)

    def grad_norms(self, sets: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Return the global norm of the accumulated gradients of each set, of each the mean per step of its period.

        Called by all ranks with the same keys; a rank's part of a set may be empty. The norm of gradients that were not
        reduced tells only whether they are finite.
        """
        names = sorted({name for members in sets.values() for name in members})
        squares = dict(zip(names, self.updater.square_norms(names).unbind(), strict=True))
        totals = [
            # A weight of 0 keeps what is not finite visible: 0 * inf is nan.
            sum(
                (squares[name] * (self._weights[name] / self.cadences[name].period ** 2) for name in members),
                self._zero(),
            )
            for members in sets.values()
        ]
        return dict(zip(sets, self._over_ranks(torch.stack(totals)).sqrt().unbind(), strict=True)) if sets else {}

    @torch.no_grad()
    def step(self, step: int, grad_norm: Tensor) -> None:
        """Update what is due at step `step`, with its gradients scaled to the clip norm.

        Args:
            step: Counted from 1.
            grad_norm: Of all due parameters.
        """
        clip, names = self.config.grad_clip, self.due(step)
        scale = 1.0 if clip is None else (clip / (grad_norm + 1e-6)).clamp_max(1.0)
        mean = self.config.accumulate == "mean"
        scales = {name: scale / self.cadences[name].period if mean else scale for name in names}
        self.updater.update(names, scales, self.rates(step))
        if self.mesh.dp_group.size() > 2:
            # Sums of three and more replicas may differ between the stages in the last bit; the copies must not.
            for name in set(self.tied) & set(names):
                dist.broadcast(self.parameters[name].detach(), group=self.mesh.embedding_group, group_src=0)

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return copies of the parts of float32 masters that are here."""
        return [master.clone() for master in self.updater.masters(names)]

    def change(self, names: Mapping[str, Sequence[str]], before: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
        """Return the root mean square of the change of each set's masters, over all ranks.

        Args:
            names: Parameters of each set that are here.
            before: What `masters` returned for each set.
        """
        sums = []
        for key, members in names.items():
            square, count = self._zero(), 0.0
            for name, old, new in zip(members, before[key], self.updater.masters(members), strict=True):
                square = square + (old - new).square().sum() * self._weights[name]
                count += new.numel() * self._weights[name]
            sums += [square, square.new_tensor(count)]
        if not sums:
            return {}
        totals = self._over_ranks(torch.stack(sums)).tolist()
        return {key: (totals[2 * i] / totals[2 * i + 1]) ** 0.5 for i, key in enumerate(names)}

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(iter(self.parameters.values())).device)

    def _over_ranks(self, values: Tensor) -> Tensor:
        if self.mesh.world_group.size() > 1:
            dist.all_reduce(values, group=self.mesh.world_group)
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters and the rule's state, by name; a rank returns what it alone has, or what all have."""
        return self.updater.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned, after its tensors have been filled."""
        self.updater.load_state_dict(state)

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of the whole parameter, not of this rank's tensor-parallel slice."""
        return self.updater.holds_whole(name)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint takes from this rank, by parameter name."""
        return self.updater.weights()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` returned, after its tensors have been filled; before `load_state_dict`."""
        self.updater.load_weights(weights)

    def reset_masters(self) -> None:
        """Set masters to the weights, as in a new run: in place of `load_state_dict`."""
        self.updater.reset_masters()

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters, in parts that add up over replicas."""
        return self.updater.sums()

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums, in parts that add up over replicas in any way; what is missing is zero."""
        self.updater.load_sums(sums)
