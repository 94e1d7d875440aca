"""Rotary position embedding (RoFormer, arXiv 2104.09864), rotating the two halves of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the angle per token of each pair of channels, `[D / 2]`, float32."""
    return theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def slow_down(frequencies: Tensor, factor: float, low: float, high: float, first_context: int) -> Tensor:
    """Divide frequencies by `factor`, those that turn often in the first context less, or not at all (Llama 3.1).

    Args:
        frequencies: Angle per token.
        factor: Divisor of frequencies with at most `low` turns.
        low: See `factor`.
        high: Turns from which a frequency stays as it is; the divisors' reciprocals lie on a line between.
        first_context: Tokens in which turns are counted.
    """
    turns = first_context * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_tables(start: int, tokens: int, frequencies: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, float32, of the positions of tokens.

    Args:
        start: Position of the first token.
        tokens: Number of tokens, `T`.
        frequencies: Angle per token of each pair of channels `[D / 2]`.
        first: Place of the first token of each token's document `[B, T]`, at which positions begin anew.

    Returns:
        Tables `[T, D / 2]`, or `[B, 1, T, D / 2]` with documents.
    """
    positions = torch.arange(start, start + tokens, device=frequencies.device)
    if first is not None:
        positions = (positions - first)[:, None]
    angles = positions.float()[..., None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x` `[..., T, D]` by the tables of its positions."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
