"""Short convolution, SiLU, unit norm and heads first, by torch's operations or in one pass over memory in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer
from hopescale.ops.norm import l2_norm
from hopescale.ops.short_conv import document_tail, short_conv


def head_streams(
    x: Tensor,
    weight: Tensor | None,
    tail: Tensor | None,
    unit: Sequence[bool],
    *,
    first: Tensor | None = None,
    backend: Literal["torch", "cpp"] = "torch",
) -> tuple[Tensor, Tensor | None]:
    """Cut projected inputs into streams of heads.

    Args:
        x: Projected inputs `[T, B, H, P, D]`.
        weight: Filters of a causal depthwise convolution with SiLU, oldest token first: `[H * P * D, W]`; None for
            neither.
        tail: Inputs before `x`, `W - 1` of them: `[W - 1, B, H * P * D]`; None without a filter.
        unit: Flag of each slice: whether its vectors are scaled to unit length.
        first: Place of the first token of each token's document, as in `short_conv`; the filter reads nothing before.
        backend: Code that computes; `backends.select_streams` chooses it.

    Returns:
        Streams `[P, B, H, T, D]`, at least float32, and the tail for the next call.
    """
    if backend == "cpp":
        return _head_streams_cpp(x, weight, tail, unit, first)
    kind = torch.promote_types(x.dtype, torch.float32)
    if weight is not None:
        mixed, tail = short_conv(x.flatten(2), weight.to(x.dtype), tail, first)
        x = mixed.unflatten(-1, x.shape[2:])
    x = x.to(kind)
    if all(unit):
        x = l2_norm(x)
    elif any(unit):
        x = torch.stack([l2_norm(part) if one else part for part, one in zip(x.unbind(3), unit, strict=True)], dim=3)
    return x.permute(3, 1, 2, 0, 4).contiguous(), tail


def _head_streams_cpp(
    x: Tensor, weight: Tensor | None, tail: Tensor | None, unit: Sequence[bool], first: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    after, x = None, x if x.stride(-1) == 1 else x.contiguous()
    if weight is not None:
        weight, tail, taps = weight.contiguous(), tail.to(x.dtype).contiguous(), weight.shape[1]
        last = x[max(0, x.shape[0] - taps + 1) :].flatten(2)
        after = torch.cat([tail, last])[last.shape[0] :]
        after = after if first is None else document_tail(after, first)
    given = x, weight, tail, tuple(unit), first
    return _HeadStreams.apply(*given) if torch.is_grad_enabled() else _forward(*given), after


class CLayout(ctypes.Structure):
    """`Layout` of streams.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "batch", "heads", "slices", "dim", "taps", "unit")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("token", "batch", "head", "slice")),
    ]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, unit: Sequence[bool]) -> CLayout:
        """Describe projected inputs and the streams that are made of them."""
        taps = 0 if weight is None else weight.shape[1]
        return cls(*x.shape, taps, sum(one << number for number, one in enumerate(unit)), *x.stride()[:-1])


def _forward(
    x: Tensor, weight: Tensor | None, tail: Tensor | None, unit: Sequence[bool], first: Tensor | None
) -> Tensor:
    tokens, batch, heads, slices, dim = x.shape
    layout, streams = CLayout.of(x, weight, unit), x.new_empty(slices, batch, heads, tokens, dim)
    tensors = [pointer(one) for one in (x, weight, tail, first, streams)]

    def run(begin: int, end: int) -> None:
        library().hopescale_streams_forward(ctypes.byref(layout), begin, end, *tensors)

    parallel_for(run, heads)
    return streams


class _HeadStreams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, tail: Tensor | None, unit: Sequence[bool], first: Tensor | None
    ) -> Tensor:
        ctx.unit = unit
        ctx.save_for_backward(x, weight, tail, first)
        return _forward(x, weight, tail, unit, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_streams: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tail, first = ctx.saved_tensors
        layout, d_x = CLayout.of(x, weight, ctx.unit), x.new_empty(x.shape)
        d_weight = None if weight is None else torch.empty_like(weight)
        d_tail = None if tail is None else torch.zeros_like(tail)
        d_streams = d_streams.contiguous()
        tensors = [pointer(one) for one in (x, weight, tail, first, d_streams, d_x, d_weight, d_tail)]

        def run(begin: int, end: int) -> None:
            library().hopescale_streams_backward(ctypes.byref(layout), begin, end, *tensors)

        parallel_for(run, x.shape[2])
        return d_x, d_weight, d_tail, None, None
