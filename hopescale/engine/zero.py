"""The update rule with its state sharded over replicas (ZeRO, arXiv 1910.02054), from stage 2 on by DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import NODE_ELEMENTS, buckets, even_sets
from hopescale.engine.even_adamw import EvenAdamW
from hopescale.engine.zero_deepspeed import FlatShards, start_deepspeed
from hopescale.engine.zero_even import EvenShards
from hopescale.engine.zero_partitioned import PartitionedModel, PartitionedShards
from hopescale.models.block import Block
from hopescale.optim import Cadence, RuleGroup, Updater
from hopescale.optim.gate import StepGate
from hopescale.optim.updater import Rates, Scales, even_shares
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.node_flat import NodeFlat

Shards = EvenShards | FlatShards | PartitionedShards
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW(Updater):
    """AdamW, an `Updater` that shards masters and moments over replicas, and from stage 2 on gradients too.

    Parameters of one level and one type are one set of shards: a set that is not due is not touched. At stage 1
    gradients accumulate whole on every replica and are sent when they are due, so that a slow level sends nothing in
    between; with nodes they are summed inside a node, and held there in shares. Sets are cut so that those of the last
    blocks are on their way while the backward pass goes on to the first. From stage 2 on gradients are sent in every
    backward pass, and each replica accumulates its shard of the sum.
    Stage 3 shards weights as well, which are whole only while a module runs.

    Args:
        groups: Groups that share settings, every parameter in one.
        eps: Term added to the root of the second moment.
        parameters, cadences, mesh: Arguments of `Updater`; parameters are on the device they stay on.
        stage: ZeRO stage: 1, 2 or 3.
        model: Model with exactly these parameters; stage 3 partitions it.
        levels: Names of parameters that are reduced together and apart from the others.
        whole: Kinds of modules whose parameters stage 3 gathers at once.
        shared: Names of parameters by block whose weights replicas of a node share out, at stage 1 with nodes.
        entries: Entries of all parameters of this rank, other updaters' too; None is its own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        eps: float,
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
        stage: int,
        model: nn.Module | None = None,
        levels: Collection[Collection[str]] = (),
        whole: Collection[type[nn.Module]] = (Block,),
        shared: Sequence[Collection[str]] = (),
        entries: int | None = None,
    ):
        super().__init__(parameters, cadences, mesh, accumulates=False)
        self._entries = entries or sum(parameter.numel() for parameter in self.parameters.values())
        self.stage, self._tiers = stage, mesh.tiers
        self._block_of = {name: number for number, names in enumerate(shared) for name in names}
        # Stages, and ranks that share sequences, are not at the same place of a backward pass.
        self._flushes = mesh.pp_group.size() == mesh.cp_group.size() == 1
        self._groups, self._eps = groups, eps
        self._device = next(iter(self.parameters.values())).device
        self._shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self._reduced: set[str] = set()
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        self._owners = even_shares(sizes, self.dp_group.size())
        make = self._maker(model, whole)
        self._sets = [
            make({name: self.parameters[name] for name in names}, _within(groups, names))
            for names in self._together(levels)
        ]
        self._set_of = {name: shards for shards in self._sets for name in shards.parameters}
        if stage == 1:
            self._rule = EvenAdamW(self._sets, groups, eps)
            self._accumulate_flat()

    def _together(self, levels: Collection[Collection[str]]) -> list[list[str]]:
        """Put together what is updated together; at stage 1 in sets that are small enough to be summed in between."""
        sets = _updated_together(self.parameters, self.cadences, levels, self._block_of)
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        if self.stage > 1 or (self._tiers.has_nodes and not self._flushes):
            return sets
        if self._tiers.has_nodes:
            # A block's are gathered at once.
            rooms = [sum(map(sizes.get, names)) if self._is_shared(names) else NODE_ELEMENTS for names in sets]
            return [
                part
                for names, room in zip(sets, rooms, strict=True)
                for part in buckets(names, dict.fromkeys(names, 0), sizes, room)
            ]
        place = {name: number for number, name in enumerate(self.parameters)}
        parts = [part for names in sets for part in even_sets({name: sizes[name] for name in names}, self._entries)]
        # Weights are handed out in the order in which a forward pass wants them.
        return sorted(parts, key=lambda names: min(place[name] for name in names))

    def _is_shared(self, names: Iterable[str]) -> bool:
        """Tell whether replicas of a node share out the weights of a set."""
        return not self._block_of.keys().isdisjoint(names)

    def node_flats(self) -> list[tuple[str, NodeFlat]]:
        """Return the weights that replicas of a node share out, each with the name of a parameter in it."""
        shared = [each for each in self._sets if self._is_shared(each.parameters)]
        return [(next(iter(each.parameters)), each.node_flat) for each in shared]

    def _maker(self, model: nn.Module | None, whole: Collection[type[nn.Module]]) -> Callable[..., Shards]:
        """Return what makes a set of shards of the stage."""
        if self.stage == 1:
            return self._even_shards
        start_deepspeed(self._device)
        if self.stage == 2:
            return partial(FlatShards, dp_group=self.dp_group, eps=self._eps)
        partitioned = PartitionedModel(model, self.parameters, whole, self.dp_group)
        return partial(PartitionedShards, partitioned, eps=self._eps)

    def _even_shards(self, parameters: Mapping[str, nn.Parameter], groups: Sequence[RuleGroup]) -> Shards:
        cadence = self.cadences[next(iter(parameters))]
        how = {"flushes": self._flushes, "shares": self._is_shared(parameters)}
        return EvenShards(parameters, groups, cadence=cadence, tiers=self._tiers, **how)

    def _accumulate_flat(self) -> None:
        for shards in self._sets:
            self.accumulators |= shards.accumulators
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self.accumulators[name].take)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch."""
        super().backward(loss)
        if self.stage > 1:
            for shards in self._sets:
                shards.end_backward()

    def sums_of(self, names: Sequence[str]) -> list[list[str]]:
        """Return the sets that are due, at stage 1."""
        # Ranks that share sequences wait for each other in a backward pass, and with nodes a sum begins with a wait.
        if self.stage > 1 or (self._tiers.has_nodes and not self._flushes):
            return []
        return [list(shards.parameters) for shards in self._due(names)]

    def begin(self, names: Sequence[str]) -> None:
        """Begin to sum a set."""
        self._set_of[names[0]].reduce()

    def reduce(self, names: Sequence[str]) -> None:
        """Sum accumulated gradients over replicas, each part to the replica that has its master."""
        self._reduced.update(names)
        if self.stage > 1:
            return
        for shards in self._due(names):
            shards.reduce()

    def send(self, names: Sequence[str]) -> None:
        """Take the sums of a period that has ended out, and begin to add them up over replicas, at stage 1."""
        for shards in self._due(names):
            shards.send()

    def _sent_sums(self) -> dict[str, Tensor]:
        """Return what adds up over replicas to the totals that wait for their updates. All replicas call."""
        sets = self._sets if self.stage == 1 else ()
        return {name: total for shards in sets for name, total in shards.sent_sums().items()}

    def _send_again(self, totals: Mapping[str, Tensor]) -> None:
        for shards in self._sets:
            shards.send_again({name: totals[name] for name in shards.parameters if name in totals})

    def hold(self, names: Sequence[str]) -> None:
        """Sum what waits for a later step inside the node, if there are nodes."""
        if self._tiers.has_nodes:
            for shards in self._due(names):
                shards.hold()

    def _due(self, names: Sequence[str]) -> list[Shards]:
        due = set(names)
        sets = [shards for shards in self._sets if not due.isdisjoint(shards.parameters)]
        assert all(due.issuperset(shards.parameters) for shards in sets), "a set of shards is due as a whole"
        return sets

    def _gradient(self, name: str) -> Tensor:
        """Return the part of an accumulated gradient that is here: the whole of what stage 1 has not sent yet."""
        if self.stage == 1 and name not in self._reduced:
            waits = self._set_of[name].waits_here
            return self._set_of[name].held_part(name)[1] if waits else self.accumulated_grad(name)
        return self._set_of[name].part(name, "gradient")

    @property
    def is_gated(self) -> bool:
        """Whether `update` takes a gate: DeepSpeed knows none."""
        return self.stage == 1

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Scales, rates: Rates, gate: StepGate | None = None) -> None:
        """Take one step of AdamW with the parts that are due, and gather their weights."""
        due = self._due(names)
        self._reduced = set()
        if self.stage == 1:
            self._rule.step(due, scales, rates, gate)
            self._on_their_way += [(shards.parameters, shards.settle) for shards in due]
            self._settle_others(names)
            return
        for shards in due:
            shards.scale(scales)
            shards.step(rates)
        for shards in due:
            shards.finish()

    def defer(self, names: Sequence[str]) -> None:
        """Let weights of parameters come after `update` has returned, at stage 1; not those that nodes share out."""
        super().defer([name for name in names if name not in self._block_of])

    def drop_if_bad(self, names: Sequence[str], gate: StepGate) -> None:
        """Drop what parameters have gathered and no update has used up, if the step is bad."""
        gate.clear([sums for shards in self._due(names) for sums in shards.gathered()])

    def uncount(self, names: Sequence[str]) -> None:
        """Take back that a bad step has counted as an update of parameters, at stage 1."""
        for shards in self._due(names):
            shards.updates -= 1

    @torch.no_grad()
    def discard(self) -> None:
        """Drop all gradients, here and in the shards."""
        for shards in self._sets:
            shards.discard()
        self._reduced = set()

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the parts of float32 masters that are here, one-dimensional, maybe empty."""
        return [self._set_of[name].part(name, "master") for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters of low-precision parameters and AdamW's state, whole, of the parameters this rank owns.

        Each is gathered to one replica, on the CPU, so that any number of replicas can load it. All replicas call.
        """
        result = {}
        for name, shards in self._set_of.items():
            for key in self._keys(name):
                whole = self._gather(name, shards.part(name, key))
                if whole is not None:
                    result[f"{name}.{key}"] = whole
            if self._owns(name):
                result[f"{name}.step"] = shards.step_of(name).clone()
        return result

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        """Hand every replica its part. All replicas call, each with what its own `state_dict` had."""
        steps = torch.zeros(len(self._set_of), device=self._device)
        for index, (name, shards) in enumerate(self._set_of.items()):
            for key in self._keys(name):
                self._scatter(name, state.get(f"{name}.{key}"), shards.part(name, key))
            if self._owns(name):
                steps[index] = state[f"{name}.step"]
        dist.all_reduce(steps, group=self.dp_group)
        for (name, shards), step in zip(self._set_of.items(), steps.tolist(), strict=True):
            # Shared by parameters of one shard, which have always been updated together: cadences are for life.
            shards.step_of(name).fill_(step)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, to be read or written in place; of weights that are shared out those this rank owns.

        These are copies, at stage 3 or where nodes share weights out. All replicas call then.
        """
        if self.stage < 3 and not self._block_of:
            return super().weights()
        return self._wholes(self._set_of, "weight")

    def _saved_here(self) -> list[str]:
        return [name for name in self.parameters if self._owns(name)]

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self.stage < 3 and not self._block_of:
            super()._load_weights(weights)
            return
        for name, shards in self._set_of.items():
            self._scatter(name, weights.get(name), shards.part(name, "weight"))
        for shards in self._sets if self._block_of else ():
            shards.begin_to_hand_out()
            shards.settle()

    def _set_masters(self, names: Iterable[str]) -> None:
        for name in names:
            self._set_of[name].part(name, "master").copy_(self._set_of[name].part(name, "weight"))

    def sums(self) -> dict[str, Tensor]:
        """Return what adds up, over replicas, to the running sums of slow parameters."""
        if self._tiers.has_nodes:
            return {name: self._held_sum(name) for name in self._slow()}
        return super().sums() if self.stage == 1 else self._wholes(self._slow(), "gradient")

    def _held_sum(self, name: str) -> Tensor:
        """Return a sum so far, with zeros where other replicas of the node hold it."""
        shards = self._set_of[name]
        whole = torch.zeros(self._shapes[name], device=self._device)
        if not shards.waits_here:
            whole += self.accumulated_grad(name)
        start, part = shards.held_part(name)
        whole.view(-1)[start : start + part.numel()] += part
        return whole

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor], on_their_way: Collection[str] = ()) -> None:
        """Take over running sums, in parts that add up over replicas; a missing sum is zero."""
        if self._tiers.has_nodes:
            self._hold_sums(sums)
            return
        if self.stage == 1:
            super().load_sums(sums, on_their_way)
            return
        for name in self._slow():
            whole = torch.zeros(self._shapes[name].numel(), device=self._device)
            if name in sums:
                whole.copy_(sums[name].flatten())
            dist.all_reduce(whole, group=self.dp_group)
            part, start = self._set_of[name].part(name, "gradient"), self._set_of[name].start_of(name)
            part.copy_(whole[start : start + part.numel()])

    def _hold_sums(self, sums: Mapping[str, Tensor]) -> None:
        for shards in self._due(self._slow()):
            shards.discard()
            for name in shards.parameters:
                total = self.accumulated_grad(name)  # made on every rank, as all of a node sum it
                if name in sums:
                    total.copy_(sums[name])
            shards.hold()

    def _slow(self) -> list[str]:
        return [name for name in self._set_of if self.cadences[name].period > 1]

    def _keys(self, name: str) -> tuple[str, ...]:
        return ("master", *MOMENTS) if self._set_of[name].is_low_precision else MOMENTS

    def _owns(self, name: str) -> bool:
        return self._owners[name] == self.dp_group.rank()

    def _wholes(self, names: Iterable[str], key: str) -> dict[str, Tensor]:
        """Return a tensor of the parameters this rank owns, whole. All replicas call."""
        wholes = {name: self._gather(name, self._set_of[name].part(name, key)) for name in names}
        return {name: whole for name, whole in wholes.items() if whole is not None}

    def _gather(self, name: str, part: Tensor) -> Tensor | None:
        """Return the whole of which every replica has a part, on the CPU, on the owner of the parameter alone."""
        start = self._set_of[name].start_of(name)
        whole = part.new_zeros(self._shapes[name].numel())
        whole[start : start + part.numel()] = part
        dist.reduce(whole, dist.get_global_rank(self.dp_group, self._owners[name]), group=self.dp_group)
        return whole.cpu().view(self._shapes[name]) if self._owns(name) else None

    def _scatter(self, name: str, whole: Tensor | None, part: Tensor) -> None:
        """Fill every replica's part from the whole, which the owner of the parameter has."""
        flat = part.new_empty(self._shapes[name].numel())
        if whole is not None:
            flat.copy_(whole.flatten())
        dist.broadcast(flat, dist.get_global_rank(self.dp_group, self._owners[name]), group=self.dp_group)
        start = self._set_of[name].start_of(name)
        part.copy_(flat[start : start + part.numel()])


def _updated_together(
    parameters: Mapping[str, nn.Parameter],
    cadences: Mapping[str, Cadence],
    levels: Collection[Collection[str]],
    block_of: Mapping[str, int],
) -> list[list[str]]:
    level_of = {name: index for index, names in enumerate(levels) for name in names}
    sets: dict[tuple, list[str]] = {}
    for name, parameter in parameters.items():
        sets.setdefault((level_of.get(name), cadences[name], parameter.dtype, block_of.get(name)), []).append(name)
    return list(sets.values())


def _within(groups: Sequence[RuleGroup], names: Sequence[str]) -> list[RuleGroup]:
    chosen = set(names)
    parts = [replace(group, members=tuple(name for name in group.members if name in chosen)) for group in groups]
    return [part for part in parts if part.members]
