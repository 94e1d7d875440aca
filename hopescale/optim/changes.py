"""How much updates have changed weights, for the host to read when the device has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hopescale.parallel.host_copy import HostCopy


class WeightChanges:
    """Root mean squares of changes of weights, which the device may still compute.

    Args:
        names: Names of sets of weights.
        totals: Sum of squares of each set, and its number of entries; None for no sets.
    """

    def __init__(self, names: Sequence[str], totals: Tensor | None):
        self._names, self._copy = names, None if totals is None else HostCopy(totals)

    def read(self) -> dict[str, float]:
        """Return the change of each set; wait for it."""
        totals = [] if self._copy is None else self._copy.read()
        pairs = zip(totals[::2], totals[1::2], strict=True)
        return {name: (squares / count) ** 0.5 for name, (squares, count) in zip(self._names, pairs, strict=True)}


def square_change(before: Sequence[Tensor], after: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of squared differences of tensors; `before` become the differences.

    A third set of weights would be the most that an update needs.
    """
    differences = list(before)
    torch._foreach_sub_(differences, list(after))
    return (torch.stack(torch._foreach_norm(differences)).square() * weights).sum()
