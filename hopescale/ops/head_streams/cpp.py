"""Streams of heads as one differentiable operation, computed in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer


class _Layout(ctypes.Structure):
    """`Layout` of streams.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "batch", "heads", "slices", "dim", "taps", "unit")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("token", "batch", "head", "slice")),
    ]

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | None, unit: Sequence[bool]) -> _Layout:
        taps = 0 if weight is None else weight.shape[1]
        return cls(*x.shape, taps, sum(one << number for number, one in enumerate(unit)), *x.stride()[:-1])


class _HeadStreams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, tail: Tensor | None, unit: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None]:
        tokens, batch, heads, slices, dim = x.shape
        layout, streams = _Layout.of(x, weight, unit), x.new_empty(slices, batch, heads, tokens, dim)
        tensors = [pointer(one) for one in (x, weight, tail, streams)]

        def run(begin: int, end: int) -> None:
            library().hopescale_streams_forward(ctypes.byref(layout), begin, end, *tensors)

        parallel_for(run, heads)
        ctx.unit = unit
        ctx.save_for_backward(x, weight, tail)
        return streams

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_streams: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tail = ctx.saved_tensors
        layout, d_x = _Layout.of(x, weight, ctx.unit), x.new_empty(x.shape)
        d_weight = None if weight is None else torch.empty_like(weight)
        d_tail = None if tail is None else torch.zeros_like(tail)
        d_streams = d_streams.contiguous()
        tensors = [pointer(one) for one in (x, weight, tail, d_streams, d_x, d_weight, d_tail)]

        def run(begin: int, end: int) -> None:
            library().hopescale_streams_backward(ctypes.byref(layout), begin, end, *tensors)

        parallel_for(run, x.shape[2])
        return d_x, d_weight, d_tail, None


def head_streams_cpp(
    x: Tensor, weight: Tensor | None, tail: Tensor | None, unit: Sequence[bool]
) -> tuple[Tensor, Tensor | None]:
    """Cut projected inputs into streams. Same arguments and result as `head_streams`."""
    after, x = None, x if x.stride(-1) == 1 else x.contiguous()
    if weight is not None:
        weight, tail, taps = weight.contiguous(), tail.to(x.dtype).contiguous(), weight.shape[1]
        last = x[max(0, x.shape[0] - taps + 1) :].flatten(2)
        after = torch.cat([tail, last])[last.shape[0] :]
    return _HeadStreams.apply(x, weight, tail, tuple(unit)), after
