"""Update rules for matrices, each of which belongs to one replica (layer-wise ZeRO, stage 1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.common.errors import ConfigError
from hopescale.config.schema import OptimConfig
from hopescale.cost.updates import BUCKET_ELEMENTS, buckets
from hopescale.optim.buckets import Bucket, InFlight, pack, take_sums, take_weights
from hopescale.optim.cadence import Cadence
from hopescale.optim.ownership import Ownership
from hopescale.optim.rules import make_rule
from hopescale.optim.shape_class import ShapeClass, Slices
from hopescale.optim.updater import RuleGroup, Updater
from hopescale.parallel.mesh import Mesh


class LayerwiseOptimizer(Updater):
    """Rules that look at whole matrices, an `Updater` in which every matrix belongs to one replica.

    `Ownership` says which. The owner alone holds float32 master and state of a matrix. Gradients accumulate whole on
    every replica and are summed at the owner when they are due; updated weights go from owners to all. A parameter that
    is not due sends nothing. All that is due together takes one exchange of each kind, or several if that is much; then
    weights are on their way while others are updated. Matrices that are alike and due together are one `ShapeClass`,
    updated at once.

    Under tensor parallelism a matrix is this rank's slice, or with `tp_mode: gather` the whole: the tensor-parallel
    ranks of an owner divide its matrices among themselves, and exchange slices of gradients and weights. Matrices
    that are split between heads are whole on their rank as they are. DGD changes every row by itself: slices of rows
    are never gathered for it.

    The Gram matrices that DGD needs are accumulated and sent like gradients, beside them.

    Args:
        groups: Groups that share settings and rule, every parameter in one.
        config: Settings of the rules, and `tp_mode`.
        parameters, cadences, mesh: Arguments of `Updater`; the storage of parameters becomes part of larger tensors.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        config: OptimConfig,
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
    ):
        self.tp_group = mesh.tp_group
        self._group_of = {name: group for group in groups for name in group.members}
        self._takes_mean = config.accumulate == "mean"
        rules = {name: self._group_of[name].rule for name in parameters}
        self.ownership = Ownership(parameters, rules, config, cadences, mesh)
        _refuse_idle_blocks(parameters, rules, config)
        self.classes = self._make_classes(parameters, cadences, mesh.dp_group.rank())
        self._position = {name: (i, j) for i, each in enumerate(self.classes) for j, name in enumerate(each.names)}
        buffers = {name: self.classes[i].gradients[j] for name, (i, j) in self._position.items()}
        super().__init__(parameters, cadences, mesh, buffers=buffers)
        self._masters = {
            name: master
            for each in self.classes
            for name, master in zip(each.mastered, each.master.detach(), strict=True)
        }
        self.rules = self._make_rules(groups, config)
        self._reduced: set[str] = set()
        self._reducing = InFlight()

    def _make_classes(
        self, parameters: Mapping[str, nn.Parameter], cadences: Mapping[str, Cadence], replica: int
    ) -> list[ShapeClass]:
        """Put together what is alike and due together, in the same order on all ranks."""
        alike: dict[tuple, list[str]] = defaultdict(list)
        for name, p in parameters.items():
            split = p.spec.partition_dim if self.ownership.is_gathered(name) else None
            alike[self._group_of[name].name, cadences[name], p.dtype, p.shape, p.spec.parts, split].append(name)
        classes = []
        for (*_, split), names in alike.items():
            names = sorted(names, key=lambda name: (self.ownership.replica[name], self.ownership.tp_rank.get(name)))
            owners = [self.ownership.replica[name] for name in names]
            here = slice(sum(owner < replica for owner in owners), sum(owner <= replica for owner in owners))
            slices = None
            if split is not None:
                ranks = [self.ownership.tp_rank[name] for name in names[here]]
                slices = Slices(self.tp_group, split, [ranks.count(rank) for rank in range(self.tp_group.size())])
            gram = None
            if self._group_of[names[0]].rule == "dgd":
                gram = self.ownership.shape[names[0]][-1], parameters[names[0]].shape[-1]
            classes.append(ShapeClass({name: parameters[name] for name in names}, here, slices, gram))
        return classes

    def _make_rules(self, groups: Sequence[RuleGroup], config: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        of_rule = defaultdict(list)
        masters = {each.names[0]: each.master for each in self.classes if each.mastered}
        for group in groups:
            here = group.of(masters)
            if here["params"]:
                of_rule[group.rule].append(here)
        return {rule: make_rule(rule, of_rule[rule], config) for rule in of_rule}

    def _rule_of(self, each: ShapeClass) -> torch.optim.Optimizer:
        return self.rules[self._group_of[each.names[0]].rule]

    def holds_whole(self, name: str) -> bool:
        """Tell whether a parameter's state is of the whole, not of this rank's tensor-parallel slice."""
        return self.ownership.is_gathered(name)

    def reduce(self, names: Sequence[str]) -> None:
        """Sum accumulated gradients over replicas, each at the replica that owns it."""
        self._reduced.update(names)
        if self.dp_group.size() == 1:
            return
        for bucket in self._buckets(names, "gradients", "grams"):
            spans = [self._spans(part, "gradients", "grams") for part in bucket.parts]
            flat = torch.zeros(len(spans), bucket.room, device=self.classes[0].gradients.device)
            for tensors, row in zip(spans, flat, strict=True):
                pack(tensors, row)
            own = flat.new_empty(bucket.room)
            work = dist.reduce_scatter_tensor(own, flat.view(-1), group=self.dp_group, async_op=True)
            self._reducing.add(work, partial(take_sums, flat, own, spans[self.dp_group.rank()]))
        for tensor in self._spans([name for name in names if not self.ownership.is_here(name)], "gradients", "grams"):
            tensor.zero_()

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of a parameter's gradients since its last update."""
        self._reducing.wait()
        return super().accumulated_grad(name)

    def _spans(self, names: Iterable[str], *stacks: str) -> list[Tensor]:
        """Return the places of parameters in the stacks of their classes, neighbours as one tensor."""
        spans: list[list[int]] = []
        for index, position in sorted(self._position[name] for name in names):
            if spans and spans[-1][0] == index and spans[-1][2] == position:
                spans[-1][2] += 1
            else:
                spans.append([index, position, position + 1])
        pieces = (
            (getattr(self.classes[index], stack), start, stop) for index, start, stop in spans for stack in stacks
        )
        return [stack[start:stop] for stack, start, stop in pieces if stack is not None]

    def _buckets(self, names: Sequence[str], *stacks: str) -> list[Bucket]:
        replicas, names = self.dp_group.size(), sorted(names, key=self._position.__getitem__)
        sizes = {name: sum(span.numel() for span in self._spans([name], *stacks)) for name in names}
        result = []
        for bucket in buckets(names, self.ownership.replica, sizes, BUCKET_ELEMENTS // replicas):
            parts = [[name for name in bucket if self.ownership.replica[name] == owner] for owner in range(replicas)]
            room = max(sum(sizes[name] for name in part) for part in parts)
            result.append(Bucket(parts, room, max(self._position[name][0] for name in bucket)))
        return result

    def _gradient(self, name: str) -> Tensor:
        """Return an accumulated gradient, or nothing of one that was sent to its owner."""
        if name in self._reduced and not self.ownership.is_here(name):
            return torch.zeros(0, device=self.parameters[name].device)
        return self.accumulated_grad(name)

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Update the matrices that are due and belong here, and hand all weights that are due to all replicas."""
        for rule in self.rules.values():
            for group in rule.param_groups:
                group["lr"] = rates[group["name"]]
        self._reducing.wait()
        gathering, complete = InFlight(), self._buckets_by_last_class(names)
        for index in self._due(names):
            each = self.classes[index]
            self._update_class(each, scales[each.names[0]])
            for bucket in complete[index]:
                # On its way while the next classes are updated.
                self._all_gather_weights(bucket, gathering)
        gathering.wait()
        self._reduced = set()

    def discard(self) -> None:
        """Drop all gradients and Gram matrices, on every replica."""
        self._reducing.wait()
        super().discard()
        for each in self.classes:
            if each.grams is not None:
                each.grams.zero_()
        self._reduced = set()

    def _due(self, names: Sequence[str]) -> list[int]:
        due = set(names)
        classes = [index for index, each in enumerate(self.classes) if not due.isdisjoint(each.names)]
        assert all(due.issuperset(self.classes[index].names) for index in classes), "a class is due as a whole"
        return classes

    def _update_class(self, each: ShapeClass, scale: Tensor | float) -> None:
        """Update what belongs here of a class, which has one cadence and thus one scale."""
        period = self.accumulators[each.names[0]].cadence.period
        # Clipping makes a step smaller, not the inputs.
        gradient, gram = each.gradient(scale), each.gram(1 / period if self._takes_mean else 1.0)
        if each.mastered:
            each.master.grad, each.master.gram = gradient, gram
            self._rule_of(each).step()
            each.master.grad = each.master.gram = None
        each.clear()
        each.set_weights()

    def _buckets_by_last_class(self, names: Sequence[str]) -> dict[int, list[Bucket]]:
        """Return buckets of weights of one type each, by the class after whose update they are complete."""
        result: dict[int, list[Bucket]] = defaultdict(list)
        if self.dp_group.size() == 1:
            return result
        alike: dict[torch.dtype, list[str]] = defaultdict(list)
        for name in names:
            alike[self.parameters[name].dtype].append(name)
        for part in alike.values():
            for bucket in self._buckets(part, "weights"):
                result[bucket.last].append(bucket)
        return result

    def _all_gather_weights(self, bucket: Bucket, gathering: InFlight) -> None:
        """Begin to copy updated weights from their owners to all replicas."""
        spans, rank = [self._spans(part, "weights") for part in bucket.parts], self.dp_group.rank()
        own = self.classes[bucket.last].weights.new_zeros(bucket.room)
        pack(spans[rank], own)
        flat = own.new_empty(len(spans), bucket.room)
        work = dist.all_gather_into_tensor(flat.view(-1), own, group=self.dp_group, async_op=True)
        gathering.add(work, partial(take_weights, own, flat, [*spans[:rank], [], *spans[rank + 1 :]]))

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the float32 masters that are here, whole; nothing of the others."""
        nothing = torch.zeros(0, device=self.classes[0].weights.device)
        return [self._masters.get(name, nothing) for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters of low-precision parameters and the rules' state, of what belongs here."""
        result = {}
        for each in self.classes:
            state = self._rule_of(each).state[each.master] if each.mastered else {}
            for index, name in enumerate(each.mastered):
                if each.weights.dtype != torch.float32:
                    result[f"{name}.master"] = self._masters[name]
                # A number of updates is that of the whole class.
                result |= {f"{name}.{key}": value[index] if value.dim() else value for key, value in state.items()}
        return result

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters, and as `<parameter>.gram` those of their Gram matrices.

        These are whole, or split over tensor-parallel ranks along their columns as the parameter is.
        """
        result = super().sums()
        for name, gram in self._slow_grams().items():
            parameter = self.parameters[name]
            num_inputs = parameter.spec.whole_shape(parameter.shape, self.tp_group.size())[-1]
            columns = gram.new_zeros(num_inputs, gram.shape[-1])
            self._own_rows(columns, gram).copy_(gram)
            result[f"{name}.gram"] = columns
        return result

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums, in parts that add up over replicas; a missing sum is zero."""
        super().load_sums(sums)
        for name, gram in self._slow_grams().items():
            columns = sums.get(f"{name}.gram")
            gram.zero_() if columns is None else gram.copy_(self._own_rows(columns, gram))

    def _slow_grams(self) -> dict[str, Tensor]:
        """Return the Gram matrices that outlive a step."""
        result = {}
        for each in self.classes:
            if each.grams is not None and self.accumulators[each.names[0]].persists:
                result |= zip(each.names, each.grams, strict=True)
        return result

    def _own_rows(self, columns: Tensor, gram: Tensor) -> Tensor:
        """Return the part of a Gram matrix's columns that is gathered here: all rows, or this rank's slice of them."""
        return columns if columns.shape == gram.shape else columns.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _set_masters(self, names: Iterable[str]) -> None:
        """Set masters to weights. All tensor-parallel ranks call."""
        names = set(names)
        for each in self.classes:
            if not names.isdisjoint(each.names):
                each.set_master()


def _refuse_idle_blocks(parameters: Mapping[str, nn.Parameter], rules: Mapping[str, str], config: OptimConfig) -> None:
    for rule in sorted({*rules.values()} & {"muon", "m3"}):
        fused = any(parameters[name].spec.parts for name, each in rules.items() if each == rule)
        if (blocks := getattr(config, rule).blocks) != "matrix" and not fused:
            message = f"optim.{rule}.blocks is {blocks}, but no group with rule: {rule} has a fused in-projection"
            raise ConfigError(message, f"set it to matrix, or let a group of {rule} match *_proj.weight")
