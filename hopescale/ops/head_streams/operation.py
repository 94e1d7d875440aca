"""Short convolution, SiLU, unit norm and heads first, by torch's operations or in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hopescale.ops.head_streams.cpp import head_streams_cpp
from hopescale.ops.norm import l2_norm
from hopescale.ops.short_conv import short_conv


def head_streams(
    x: Tensor,
    weight: Tensor | None,
    tail: Tensor | None,
    unit: Sequence[bool],
    *,
    backend: Literal["torch", "cpp"] = "torch",
) -> tuple[Tensor, Tensor | None]:
    """Cut projected inputs into streams of heads.

    Args:
        x: Projected inputs `[T, B, H, S, D]`.
        weight: Filters of a causal depthwise convolution with SiLU, oldest token first: `[H * S * D, W]`; None for
            neither.
        tail: Inputs before `x`, `W - 1` of them: `[W - 1, B, H * S * D]`; None without a filter.
        unit: Flag of each slice: whether its vectors are scaled to unit length.
        backend: Code that computes; `backends.select_streams` chooses it.

    Returns:
        Streams `[S, B, H, T, D]`, at least float32, and the tail for the next call.
    """
    if backend == "cpp":
        return head_streams_cpp(x, weight, tail, unit)
    kind = torch.promote_types(x.dtype, torch.float32)
    if weight is not None:
        mixed, tail = short_conv(x.flatten(2), weight.to(x.dtype), tail)
        x = mixed.unflatten(-1, x.shape[2:])
    x = x.to(kind)
    if all(unit):
        x = l2_norm(x)
    elif any(unit):
        x = torch.stack([l2_norm(part) if one else part for part, one in zip(x.unbind(3), unit, strict=True)], dim=3)
    return x.permute(3, 1, 2, 0, 4).contiguous(), tail
