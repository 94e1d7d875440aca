"""Floating-point operations of forward and backward, as they are executed. A multiply and an add are two."""

from __future__ import annotations

from typing import NamedTuple


class Flops(NamedTuple):
    """Operations of a forward and of its backward."""

    forward: float
    backward: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: float) -> Flops:
        """Return the operations of doing it `count` times."""
        return Flops(count * self.forward, count * self.backward)

    def without_backward(self) -> Flops:
        """Return the operations where no gradient comes back."""
        return Flops(self.forward, 0)

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


NOTHING = Flops(0, 0)


def product(rows: float, inner: float, columns: float, *, gradients: int = 2) -> Flops:
    """Count a matrix product `[rows, inner] @ [inner, columns]`.

    Args:
        rows: See above.
        inner: See above.
        columns: See above.
        gradients: How many of the two factors get one; each is a product of the same size.
    """
    forward = 2 * rows * inner * columns
    return Flops(forward, gradients * forward)


def solve(size: float, columns: float) -> Flops:
    """Count a triangular solve of `size` equations for `columns` right-hand sides.

    Its backward is another solve for the right-hand side, and a product for the triangle.
    """
    forward = size * size * columns
    return Flops(forward, forward + 2 * forward)
