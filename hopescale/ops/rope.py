"""Rotary position embedding (RoFormer, arXiv 2104.09864), rotating the two halves of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(start: int, tokens: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[T, D / 2]`, float32, of positions `start ... start + tokens - 1`."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.arange(start, start + tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x` `[..., T, D]` by the tables of its positions."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
