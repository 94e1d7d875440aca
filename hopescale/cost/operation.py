"""The cost of an operation on tensors: operations of its forward and backward, and entries that the backward keeps."""

from __future__ import annotations

from typing import NamedTuple


class OpCost(NamedTuple):
    """Operations of forward and backward as torch executes them; a multiply and an add are two.

    Entries that the forward leaves for the backward are `saved`, where they are counted.
    """

    forward: float
    backward: float
    saved: float = 0

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, count: float) -> OpCost:
        """Return the cost of `count` such operations."""
        return OpCost(*(count * part for part in self))

    @property
    def total(self) -> float:
        """Operations of forward and backward."""
        return self.forward + self.backward


NOTHING = OpCost(0, 0)


def product(rows: float, inner: float, columns: float) -> OpCost:
    """Count a matrix product `[rows, inner] @ [inner, columns]`; each factor's gradient is another of its size."""
    forward = 2 * rows * inner * columns
    return OpCost(forward, 2 * forward)


def solve(size: float, columns: float) -> OpCost:
    """Count a triangular solve of `size` equations for `columns` right-hand sides.

    Its backward is another solve for the right-hand side, and a product for the triangle.
    """
    forward = size * size * columns
    return OpCost(forward, 3 * forward)


def saved(entries: float) -> OpCost:
    """Count the entries that the backward pass keeps of elementwise operations."""
    return OpCost(0, 0, entries)
