"""Update rules for matrices, each of which belongs to one replica (layer-wise ZeRO, stage 1)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hopescale.config.schema import OptimConfig
from hopescale.cost.updates import MATRIX_ELEMENTS
from hopescale.optim.cadence import Cadence
from hopescale.optim.class_flats import ClassFlats, Together, put_together
from hopescale.optim.gate import StepGate, uncount
from hopescale.optim.owned_flat import OwnedFlat
from hopescale.optim.owner_exchange import OwnerExchanges
from hopescale.optim.ownership import Ownership
from hopescale.optim.rules import make_rule
from hopescale.optim.shape_class import ShapeClass, Slices
from hopescale.optim.updater import Rates, RuleGroup, Scales, Updater, scale_together
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.node_flat import NodeFlat


class LayerwiseOptimizer(Updater):
    """Rules that look at whole matrices, an `Updater` in which every matrix belongs to one replica.

    `Ownership` says which. The owner alone holds float32 master and state of a matrix. Gradients accumulate whole on
    every replica and are summed at the owner when they are due; updated weights go from owners to all. A parameter that
    is not due sends nothing. What is due together lies in one `OwnedFlat`, which is exchanged in equal parts; its
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
        levels: Names of parameters that are reduced together and apart from the others.
        shared: Names of parameters by block whose weights replicas of a node share out.
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
        levels: Collection[Collection[str]] = (),
        shared: Sequence[Collection[str]] = (),
    ):
        self.tp_group, self._has_nodes = mesh.tp_group, mesh.tiers.has_nodes
        self._group_of = {name: group for group in groups for name in group.members}
        self._takes_mean = config.accumulate == "mean"
        rules = {name: self._group_of[name].rule for name in parameters}
        self.ownership = Ownership(parameters, rules, config, cadences, mesh)
        block_of = {name: number for number, names in enumerate(shared) for name in names}
        alike = put_together(parameters, cadences, levels, self._group_of, self.ownership, mesh.tiers)
        flats = ClassFlats(parameters, alike, self.ownership, mesh.tiers, block_of)
        self._sums, self._weights, self._exchanges = flats.sums, flats.weights, OwnerExchanges(mesh.tiers)
        self._shared = [each for each in flats.weights if each.flat.shared is not None]
        self.classes = self._make_classes(parameters, flats)
        self._flats_of = [
            [number for number, flat in enumerate(self._weights) if not flat.names.isdisjoint(each.names)]
            for each in self.classes
        ]
        self._class_of = {name: index for index, each in enumerate(self.classes) for name in each.names}
        self._flat_of = {name: each.flat for each in self._sums for name in each.names}
        wakes = {name: flat.wake for name, flat in self._flat_of.items()}
        super().__init__(parameters, cadences, mesh, buffers=flats.gradients, wakes=wakes)
        self._grams = flats.grams
        self._masters = {
            name: master
            for each in self.classes
            for name, master in zip(each.mastered, each.master.detach(), strict=True)
        }
        self.rules = self._make_rules(groups, config)
        self._reduced: set[str] = set()
        # With nodes a sum begins with a wait, and ranks that share sequences wait for each other in a backward pass.
        self._begins_early = not (self._has_nodes and mesh.cp_group.size() > 1)
        for each in self._sums:
            each.flat.rest()

    def _make_classes(self, parameters: Mapping[str, nn.Parameter], flats: ClassFlats) -> list[ShapeClass]:
        classes = []
        for alike, stacks in zip(flats.alike, flats.own, strict=True):
            own = [name for name in alike.names if self.ownership.is_here(name)]
            slices = None
            if alike.split is not None:
                ranks = [self.ownership.tp_rank[name] for name in own]
                slices = Slices(self.tp_group, alike.split, [ranks.count(r) for r in range(self.tp_group.size())])
            each = ShapeClass(alike.names, own, *stacks, slices)
            each.master.parts = parameters[alike.names[0]].spec.parts
            classes.append(each)
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

    def sums_of(self, names: Sequence[str]) -> list[list[str]]:
        """Return what is due together, but for what has Gram matrices, which grow beside gradients."""
        if not self._begins_early:
            return []
        due = set(names)
        ready = [each for each in self._sums if due >= each.names and self._grams.keys().isdisjoint(each.names)]
        return [sorted(each.names) for each in ready if not self._cadence_of(each).moves]

    def begin(self, names: Sequence[str]) -> None:
        """Begin to sum what is due together."""
        self.reduce(names)

    def reduce(self, names: Sequence[str]) -> None:
        """Begin to sum accumulated gradients over replicas, each at the replica that owns it."""
        before = set(self._reduced)
        self._reduced.update(names)
        for each in self._sums:
            # What is due together may be reduced in several calls.
            if self._reduced.issuperset(each.names) and not before.issuperset(each.names):
                cadence = self._cadence_of(each)
                if not cadence.moves:
                    each.flat.begin_sum()
                    continue
                if not cadence.lag:
                    each.flat.send(cadence.wire)
                each.flat.fetch()

    def send(self, names: Sequence[str]) -> None:
        """Take the sums of a period that has ended out, and begin to add them up over replicas."""
        for each in self._sums:
            if not each.names.isdisjoint(names):
                each.flat.send(self._cadence_of(each).wire)

    def _cadence_of(self, each: Together) -> Cadence:
        return self.cadences[next(iter(each.names))]

    def running_squares(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of what is gathered beside totals that have arrived."""
        self._finish_sums()
        return torch.stack([kept for each in self._sums if (kept := each.flat.kept_squares()) is not None]).sum()

    def hold(self, names: Sequence[str]) -> None:
        """Sum what waits for a later step inside the node, if there are nodes."""
        for each in self._sums:
            if not each.names.isdisjoint(names):
                each.flat.hold()

    def _finish_sums(self) -> None:
        self._exchanges.to_owners([each.flat for each in self._sums if each.flat.arrive()])

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of a parameter's gradients since its last update."""
        self._finish_sums()
        return super().accumulated_grad(name)

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norms, after sums have come to their owners: all replicas take part, also without any."""
        self._finish_sums()
        return super().square_norms(names)

    def _gradient(self, name: str) -> Tensor:
        """Return an accumulated gradient: nothing of one that was sent to its owner, what is held of one that waits.

        What waits has been held: its norm would miss what has not.
        """
        if name in self._reduced:
            here = self.ownership.is_here(name)
            return self.accumulated_grad(name) if here else torch.zeros(0, device=self.parameters[name].device)
        if self._flat_of[name].holds:
            return self._flat_of[name].held_part(self.accumulators[name].total)[1]
        return self.accumulated_grad(name)

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Scales, rates: Rates, gate: StepGate | None = None) -> None:
        """Update the matrices that are due and belong here, and hand all weights that are due to all replicas."""
        for rule in self.rules.values():
            for group in rule.param_groups:
                group["lr"] = rates[group["name"]]
        self._finish_sums()
        self.settle()
        due = self._due(names)
        left = Counter(sorted(flat for index in due for flat in self._flats_of[index]))
        self._on_their_way = [(self._weights[flat].names, self._weights[flat].flat.finish) for flat in left]
        classes = {index: self.classes[index].names for index in due}
        for together in self.ownership.rounds(classes, MATRIX_ELEMENTS):
            self._update_classes([self.classes[index] for index in together], scales, gate)
            left.subtract(flat for index in together for flat in self._flats_of[index])
            # On their way while the next classes are updated.
            self._begin_to_hand_out([self._weights[flat] for flat, count in left.items() if not count])
            left = +left
        self._settle_others(names)
        for each in self._sums:
            each.flat.put_back()
        if self._has_nodes:
            self._begin_periods(names)
        self._reduced = set()

    def defer(self, names: Sequence[str]) -> None:
        """Let weights of parameters come after `update` has returned, but for those that nodes share out."""
        shared = {name for each in self._shared for name in each.names}
        super().defer([name for name in names if name not in shared])

    def _begin_periods(self, names: Sequence[str]) -> None:
        for flat in {id(flat): flat for flat in map(self._flat_of.get, names)}.values():
            flat.discard()

    def _begin_to_hand_out(self, flats: Sequence[Together]) -> None:
        """Begin to hand out flat tensors of weights, those that nodes share out one after the other."""
        whole = [each for each in flats if each.flat.shared is None]
        for together in ([whole] if whole else []) + [[each] for each in flats if each.flat.shared is not None]:
            for each in together:
                each.flat.take((self.parameters[name].detach(), kept) for name, kept in each.kept.items())
            self._exchanges.to_parts([each.flat for each in together])
            for each in together:
                each.flat.begin_to_gather()

    def node_flats(self) -> list[tuple[str, NodeFlat]]:
        """Return the weights that replicas of a node share out, each with the name of a parameter in it."""
        return [(min(each.names), each.flat.shared) for each in self._shared]

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, to be read or written in place; of weights that are shared out those that belong here."""
        shared = {name for each in self._shared for name in each.names}
        kept = {name: tensor for each in self._shared for name, tensor in each.kept.items()}
        return {name: weight for name, weight in super().weights().items() if name not in shared} | kept

    def _saved_here(self) -> list[str]:
        whole = [name for name in super()._saved_here() if not any(name in each.names for each in self._shared)]
        return [*whole, *(name for each in self._shared for name in each.kept)]

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, own in self.weights().items():
            own.copy_(weights[name])
        for each in self._weights:
            if each.flat.shared is not None:
                self._begin_to_hand_out([each])
                each.flat.finish()
                continue
            for name, kept in each.kept.items():
                kept.copy_(self.parameters[name])

    def drop_if_bad(self, names: Sequence[str], gate: StepGate) -> None:
        """Drop what parameters have gathered and no update has used up, Gram matrices too, if the step is bad."""
        gate.clear([sums for each in self._sums if not each.names.isdisjoint(names) for sums in each.flat.gathered()])

    def uncount(self, names: Sequence[str]) -> None:
        """Take back that a bad step has counted as an update of matrices."""
        for each in (self.classes[index] for index in self._due(names)):
            if each.mastered:
                uncount(self._rule_of(each), [each.master])

    def discard(self) -> None:
        """Drop all gradients and Gram matrices, on every replica."""
        self._finish_sums()
        for each in self._sums:
            each.flat.drop_sent()
            each.flat.discard()
        self._reduced = set()

    def _due(self, names: Sequence[str]) -> list[int]:
        due = set(names)
        classes = [index for index, each in enumerate(self.classes) if not due.isdisjoint(each.names)]
        assert all(due.issuperset(self.classes[index].names) for index in classes), "a class is due as a whole"
        return classes

    def _update_classes(self, classes: Sequence[ShapeClass], scales: Scales, gate: StepGate | None) -> None:
        """Update what belongs here of classes, each of which has one cadence and thus one scale."""
        scale_together([each.gradients for each in classes], [scales[each.names[0]] for each in classes])
        sums = [sums for each in classes for sums in each.sums]
        if self._takes_mean:
            # Clipping makes a step smaller, not the inputs.
            for each in (each for each in classes if each.grams is not None):
                each.grams.mul_(1 / self.cadences[each.names[0]].period)
        if gate is not None:
            gate.clear(sums)
        for each in classes:
            each.give_sums()
        for rule in self.rules.values():
            rule.step(gate=gate)
        for each in classes:
            each.take_sums()
        torch._foreach_zero_(sums)
        for each in (each for each in classes if each.slices is not None):
            each.cut_weights()
        low = [each for each in classes if each.slices is None and each.master.dtype != each.weights.dtype]
        if low:
            torch._foreach_copy_([each.weights for each in low], [each.master for each in low])

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
        result = {name: self._sum_here(name, total) for name, total in super().sums().items()}
        for name, gram in self._slow_grams().items():
            gram = self._sum_here(name, gram)
            parameter = self.parameters[name]
            num_inputs = parameter.spec.whole_shape(parameter.shape, self.tp_group.size())[-1]
            columns = gram.new_zeros(num_inputs, gram.shape[-1])
            self._own_rows(columns, gram).copy_(gram)
            result[f"{name}.gram"] = columns
        return result

    def _sent_sums(self) -> dict[str, Tensor]:
        """Return what adds up over replicas to the totals that wait for their updates. All replicas call."""
        result = {}
        for each in self._sums:
            if (whole := each.flat.total_sent()) is not None:
                result |= {name: self._like_sum(each, name, whole) for name in sorted(each.names)}
        return result

    def _like_sum(self, each: Together, name: str, flat: Tensor) -> Tensor:
        """Return where a parameter's sum is in a flat tensor like that of its kind."""
        return each.flat.like(self.accumulators[name].total, flat)

    def _send_again(self, totals: Mapping[str, Tensor]) -> None:
        for each in self._sums:
            parts = None if each.names.isdisjoint(totals) else torch.zeros_like(each.flat.flat)
            for name in each.names if parts is not None else ():
                self._like_sum(each, name, parts).copy_(totals[name])
            each.flat.send_again(parts)

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor], on_their_way: Collection[str] = ()) -> None:
        """Take over running sums, in parts that add up over replicas; a missing sum is zero."""
        if self._has_nodes:
            for flat in self._slow_flats():
                flat.discard()
                flat.wake()
        super().load_sums(sums, on_their_way)
        for name, gram in self._slow_grams().items():
            columns = sums.get(f"{name}.gram")
            gram.zero_() if columns is None else gram.copy_(self._own_rows(columns, gram))
        for flat in self._slow_flats():
            flat.hold()

    def _slow_flats(self) -> list[OwnedFlat]:
        return [each.flat for each in self._sums if self.accumulators[min(each.names)].persists]

    def _sum_here(self, name: str, total: Tensor) -> Tensor:
        """Return a sum that outlives a step; with nodes what this replica holds of it, and zeros."""
        return self._flat_of[name].held_sum(total) if self._has_nodes else total

    def _slow_grams(self) -> dict[str, Tensor]:
        """Return the Gram matrices that outlive a step."""
        return {name: gram for name, gram in self._grams.items() if self.accumulators[name].persists}

    def _own_rows(self, columns: Tensor, gram: Tensor) -> Tensor:
        """Return the part of a Gram matrix's columns that is gathered here: all rows, or this rank's slice of them."""
        return columns if columns.shape == gram.shape else columns.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _set_masters(self, names: Iterable[str]) -> None:
        """Set masters to weights. All tensor-parallel ranks call."""
        chosen = set(names)
        for each in (each for each in self.classes if not chosen.isdisjoint(each.names)):
            each.set_master()
