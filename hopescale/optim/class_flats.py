"""Where matrices lie: in flat tensors of what is due together, owner by owner, and there class by class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hopescale.cost.updates import matrix_sets
from hopescale.optim.cadence import Cadence
from hopescale.optim.owned_flat import OwnedFlat
from hopescale.optim.ownership import Ownership
from hopescale.optim.updater import RuleGroup
from hopescale.parallel.deferred import copy_values, move_into
from hopescale.parallel.tiers import Tiers


@dataclass(frozen=True)
class Alike:
    """Matrices of one shape, type and group that are updated together.

    Attributes:
        names: Their names, in the order of their owners.
        due: Key of what is due and reduced together.
        split: Dimension along which they are gathered over tensor-parallel ranks for an update; None if they are not.
        gram: Shape of the Gram matrix, or of the columns of it, that each gathers of its inputs; None if none.
        waits: Whether gradients wait for a later step.
    """

    names: list[str]
    due: Hashable
    split: int | None
    gram: tuple[int, int] | None
    waits: bool


@dataclass(frozen=True)
class Together:
    """A flat tensor and the parameters that have a piece of it.

    Attributes:
        names: Names of the parameters.
        flat: The flat tensor.
        kept: Weights that this replica owns and keeps, by name, where `flat` is whole only while it is used.
    """

    names: frozenset[str]
    flat: OwnedFlat
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def put_together(
    parameters: Mapping[str, nn.Parameter],
    cadences: Mapping[str, Cadence],
    levels: Collection[Collection[str]],
    groups: Mapping[str, RuleGroup],
    ownership: Ownership,
    tiers: Tiers,
) -> list[Alike]:
    """Put together what is alike and due together, in the same order on all ranks.

    Without nodes, what is due together is cut into sets that a backward pass completes one after the other, but for
    what has Gram matrices.

    Args:
        parameters: Parameters by name, in the order of the model.
        cadences: Cadences of them.
        levels: Names of parameters that are reduced together and apart from the others.
        groups: Groups of them.
        ownership: Owners.
        tiers: Replicas.
    """
    level_of = {name: index for index, names in enumerate(levels) for name in names}
    together: dict[tuple, list[str]] = defaultdict(list)
    for name in parameters:
        together[level_of.get(name), cadences[name], groups[name].rule == "dgd"].append(name)
    whole, sets = sum(p.numel() for p in parameters.values()), []
    for (*_, has_grams), names in together.items():
        is_cut = tiers.group.size() > 1 and not tiers.has_nodes and not has_grams
        sets += matrix_sets({name: parameters[name].numel() for name in names}, whole) if is_cut else [names]
    set_of = {name: number for number, names in enumerate(sets) for name in names}
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, p in parameters.items():
        split = p.spec.partition_dim if ownership.is_gathered(name) else None
        alike[set_of[name], groups[name].name, p.dtype, p.shape, p.spec.parts, split].append(name)
    result = []
    for (due, *_, split), names in alike.items():
        names = sorted(names, key=lambda name: (ownership.replica[name], ownership.tp_rank.get(name)))
        gram = None
        if groups[names[0]].rule == "dgd":
            gram = ownership.shape[names[0]][-1], parameters[names[0]].shape[-1]
        result.append(Alike(names, due, split, gram, cadences[names[0]].period > 1))
    return result


class ClassFlats:
    """Flat tensors of weights, gradients and Gram matrices, of which parameters become views.

    Args:
        parameters: Parameters by name; their storage is moved, and those with a Gram matrix have it as `gram`.
        alike: Groups of what is alike, in the same order on all ranks.
        ownership: Owners.
        tiers: Replicas.
        block_of: Number of the block of each parameter whose weights replicas of a node share out.

    Attributes:
        sums: Gradients and Gram matrices, float32, a flat tensor for all that is due together.
        weights: Weights, likewise for each type, and for each block whose weights are shared out.
        gradients, grams: Views of each parameter.
        own: Stacks of weights, gradients and Gram matrices `[k, ...]` that belong to this replica, of each that is
            alike; None in place of Gram matrices if there are none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        alike: Sequence[Alike],
        ownership: Ownership,
        tiers: Tiers,
        block_of: Mapping[str, int],
    ):
        self._block_of = block_of
        self.alike, self._parameters, self._replica, self._tiers = list(alike), parameters, ownership.replica, tiers
        self.gradients: dict[str, Tensor] = {}
        self.grams: dict[str, Tensor] = {}
        own: dict[tuple[int, str], Tensor] = {}
        self.sums, self.weights = [], []
        for due in dict.fromkeys(each.due for each in alike):
            members = [number for number, each in enumerate(alike) if each.due == due]
            kinds = [(number, "gradients") for number in members]
            kinds += [(number, "grams") for number in members if alike[number].gram is not None]
            # Gram matrices grow in backward passes of layers, which wake nothing.
            sleeps = all(alike[number].gram is None for number in members)
            waits = alike[members[0]].waits
            self.sums.append(self._lay_out(kinds, torch.float32, own, waits=waits, sleeps=sleeps))
            for dtype in dict.fromkeys(self._first(number).dtype for number in members):
                chosen = [number for number in members if self._first(number).dtype == dtype]
                self.weights += self._lay_out_weights(chosen, dtype, own)
        kinds = ("weights", "gradients", "grams")
        self.own = [tuple(own.get((number, kind)) for kind in kinds) for number in range(len(alike))]

    def _first(self, number: int) -> nn.Parameter:
        return self._parameters[self.alike[number].names[0]]

    def _lay_out_weights(
        self, chosen: Sequence[int], dtype: torch.dtype, own: dict[tuple[int, str], Tensor]
    ) -> list[Together]:
        """Make a flat tensor of weights; where some are shared out one for each block, and stacks that last beside."""
        kinds, names = (
            [(number, "weights") for number in chosen],
            {n for each in chosen for n in self.alike[each].names},
        )
        blocks = sorted({self._block_of[name] for name in names if name in self._block_of})
        if not blocks:
            return [self._lay_out(kinds, dtype, own)]
        kept: dict[str, Tensor] = {}
        for number in chosen:
            here = [name for name in self.alike[number].names if self._replica[name] == self._tiers.group.rank()]
            own[number, "weights"] = self._first(number).detach().new_empty(len(here), *self._first(number).shape)
            for name, place in zip(here, own[number, "weights"], strict=True):
                copy_values(self._parameters[name], place)
                kept[name] = place
        result = []
        for block in (None, *blocks):
            inside = {name for name in names if self._block_of.get(name) == block}
            each = self._lay_out(kinds, dtype, {}, inside, is_shared=block is not None)
            if block is not None:
                each.flat.share_out()
            result.append(replace(each, kept={name: kept[name] for name in kept if name in inside}))
        return [each for each in result if each.names]

    def _lay_out(
        self,
        kinds: Sequence[tuple[int, str]],
        dtype: torch.dtype,
        own: dict[tuple[int, str], Tensor],
        among: Collection[str] | None = None,
        *,
        is_shared: bool = False,
        **times: bool,
    ) -> Together:
        """Make a flat tensor with a stack of each kind for every owner, and note the stacks that are here.

        `among` are the names to lay out; None is all of these kinds. If it `is_shared`, only what nodes keep is drawn.
        """
        held: list[list[list[str]]] = [[[] for _ in kinds] for _ in range(self._tiers.group.size())]
        for place, (number, _) in enumerate(kinds):
            for name in self.alike[number].names:
                if among is None or name in among:
                    held[self._replica[name]][place].append(name)
        shapes = [
            self.alike[number].gram if kind == "grams" else tuple(self._first(number).shape) for number, kind in kinds
        ]
        sizes = [
            [len(names) * torch.Size(shape).numel() for names, shape in zip(of_owner, shapes, strict=True)]
            for of_owner in held
        ]
        flat = OwnedFlat(sizes, self._first(kinds[0][0]).detach().new_empty(0, dtype=dtype), self._tiers, **times)
        for owner, pieces in enumerate(flat.pieces(sizes)):
            for place, ((number, kind), piece) in enumerate(zip(kinds, pieces, strict=True)):
                stack = piece.view(len(held[owner][place]), *shapes[place])
                if owner == self._tiers.group.rank():
                    own[number, kind] = stack
                for name, view in zip(held[owner][place], stack, strict=True):
                    self._place(name, kind, view, flat.share_of(view) if is_shared else None)
        return Together(frozenset(name for of_owner in held for names in of_owner for name in names), flat)

    def _place(self, name: str, kind: str, view: Tensor, drawn: range | None) -> None:
        parameter = self._parameters[name]
        if kind == "weights":
            move_into(parameter, view, drawn)
        elif kind == "gradients":
            self.gradients[name] = view
        else:
            self.grams[name] = parameter.gram = view
