"""State that a model carries from one call to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class LayerState(NamedTuple):
    """Running state of one mixer.

    Attributes:
        position: Tokens read so far, equal for all sequences of the batch.
        tensors: Named tuple of the mixer's own, of tensors, None and further named tuples. Tensors have the batch
            first; those of memories are float32.
    """

    position: int
    tensors: Any

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names that files know: `memory/running/first`, `conv_tail`."""
        return dict(_leaves(self.tensors))

    def with_named(self, tensors: Mapping[str, Tensor]) -> LayerState:
        """Return a state of the same kind that holds other tensors. The names are those of `named`."""
        return self._replace(tensors=_rebuilt(self.tensors, tensors))


def _keys(part: Any) -> tuple[str, ...]:
    """Return the names of a named tuple's parts in files: `FILE_KEYS`, where they are not its fields."""
    return getattr(part, "FILE_KEYS", part._fields)


def _leaves(part: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if part is None:
        return []
    if isinstance(part, Tensor):
        return [(prefix[:-1], part)]
    return [leaf for key, each in zip(_keys(part), part, strict=True) for leaf in _leaves(each, f"{prefix}{key}/")]


def _rebuilt(part: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    if part is None:
        return None
    if isinstance(part, Tensor):
        return tensors[prefix[:-1]]
    keys = zip(_keys(part), part, strict=True)
    return type(part)(*(_rebuilt(each, tensors, f"{prefix}{key}/") for key, each in keys))


class GroupedState(NamedTuple):
    """Running state of one mixer for groups of sequences, each of which has read a number of tokens of its own.

    Attributes:
        groups: State of each group. Its sequences lie side by side in the batch, and groups in this order.
        sizes: Number of sequences of each.
    """

    groups: tuple[LayerState, ...]
    sizes: tuple[int, ...]


class ModelState(NamedTuple):
    """Running state of a model: one `LayerState` per block, or one `GroupedState`."""

    layers: tuple[LayerState | GroupedState, ...]

    @property
    def position(self) -> int:
        """Tokens read so far, of a state without groups."""
        return self.layers[0].position

    @classmethod
    def of_groups(cls, states: Sequence[ModelState], sizes: Sequence[int]) -> ModelState:
        """Put states of groups of sequences together, of so many sequences each. One group stays as it is."""
        if len(states) == 1:
            return states[0]
        layers = zip(*(state.layers for state in states), strict=True)
        return cls(tuple(GroupedState(groups, tuple(sizes)) for groups in layers))

    def apart(self) -> list[ModelState]:
        """Return the state of each group."""
        if not isinstance(self.layers[0], GroupedState):
            return [self]
        return [ModelState(groups) for groups in zip(*(layer.groups for layer in self.layers), strict=True)]
