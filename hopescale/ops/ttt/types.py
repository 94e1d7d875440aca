"""Inputs, state and settings of test-time training, shared by the dual form and its naive twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TttStreams(NamedTuple):
    """Tokens of heads.

    Attributes:
        q: Queries `[B, H, T, D]`.
        k: Keys, the same.
        v: Values, the same.
        rate: Learned part of the inner learning rate `[B, H, T]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor

    def split(self, lengths: list[int]) -> list[TttStreams]:
        """Cut the tokens into parts; unlike slices, these have one gradient together."""
        return [TttStreams(*part) for part in zip(*(x.split(lengths, dim=2) for x in self), strict=True)]


class TttWeights(NamedTuple):
    """Weights of memories, or sums of gradients with respect to them: `z W1 + b1`, or `gelu(z W1 + b1) W2 + b2`.

    Attributes:
        w1: `[B, H, D, D]`, or `[B, H, D, E]` in front of a second layer.
        b1: `[B, H, 1, D]`, or `[B, H, 1, E]`.
        w2: `[B, H, E, D]`; None if the memory is linear.
        b2: `[B, H, 1, D]`; None if the memory is linear.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor | None
    b2: Tensor | None

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias of each layer."""
        return [(self.w1, self.b1)] + ([] if self.w2 is None else [(self.w2, self.b2)])

    def map(self, function: Callable[..., Tensor], *others: TttWeights) -> TttWeights:
        """Apply a function to every tensor, and to those at its place in other weights."""
        return TttWeights(*(None if part[0] is None else function(*part) for part in zip(self, *others, strict=True)))

    def split(self, sizes: list[int]) -> list[TttWeights]:
        """Cut the batch into parts."""
        parts = ([None] * len(sizes) if x is None else x.split(sizes) for x in self)
        return [TttWeights(*part) for part in zip(*parts, strict=True)]

    @classmethod
    def cat(cls, parts: Sequence[TttWeights]) -> TttWeights:
        """Join batches."""
        return cls(*(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True)))


class TttState(NamedTuple):
    """State of a sequence.

    Attributes:
        weights: Weights at the start of the mini-batch of the next token.
        sums: Sums of its earlier tokens' gradients, times their rates; 0 where it has none, and not looked at.
    """

    weights: TttWeights
    sums: TttWeights

    def split(self, sizes: list[int]) -> list[TttState]:
        """Cut the batch into parts."""
        parts = zip(*(part.split(sizes) for part in self), strict=True)
        return [TttState(*part) for part in parts]


class TttMemory(NamedTuple):
    """Learned parts of the inner loss, which do not change along a sequence.

    Attributes:
        scale: Factor on the inner learning rate by place in a mini-batch `[K]`; its length is that of mini-batches.
        gamma: Weights of the layer norm `[H, 1, D]`.
        beta: Biases of the layer norm, the same.
        eps: Number added to the variance.
    """

    scale: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
