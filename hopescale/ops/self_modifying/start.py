"""The learned weights that sequences begin with, one set for all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.self_modifying.types import MemoryState, Weights


class MemoryStart(NamedTuple):
    """Weights of the memories of a bank as they are learned, by memory: vector memories, then gate memories.

    They act from the left, `w @ x`, unlike `Weights`, and momentum begins with 0.

    Attributes:
        first: Matrices that read keys, `[H, R, D]` each.
        vector: Second layers of vector MLP memories, `[H, D, E]` each; empty for linear memories.
        gate: Second layers of gate MLP memories, `[H, 1, E]` each; empty for linear memories.
        momentum: Whether there is momentum.
    """

    first: tuple[Tensor, ...]
    vector: tuple[Tensor, ...]
    gate: tuple[Tensor, ...]
    momentum: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All weights, first layers first."""
        return self.first + self.vector + self.gate

    def expand(self, batch: int) -> MemoryState:
        """Lay the weights out for `batch` sequences."""

        def second(parts: tuple[Tensor, ...]) -> Tensor | None:
            return _expand(torch.stack(parts, dim=1), batch) if parts else None

        weights = Weights(_expand(torch.cat(self.first, dim=1), batch), second(self.vector), second(self.gate))
        return MemoryState(weights, weights.zeros_like() if self.momentum else None, weights)


def _expand(x: Tensor, batch: int) -> Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    return x.mT.to(kind).expand(batch, *x.shape[:-2], *x.mT.shape[-2:]).contiguous()
