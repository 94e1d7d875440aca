"""RMSNorm of a sum in one kernel, forward and backward: the sum is the residual stream, the norm a layer's input."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PROGRAMS = 1056
"""Programs of a backward pass, at most, each with its own sum of the weight's gradient: eight for each multiprocessor
of an H100."""


@triton.jit
def _forward(x, added, weight, total, y, roots, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(added + row * width + at, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row * width + at, kept, mask=inside)
        value = kept.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(roots + row, root)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(y + row * width + at, (value * root * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    total, weight, roots, d_y, d_total, d_x, d_weight, rows, width, programs, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    scale = tl.load(weight + at, mask=inside, other=0.0)
    d_scale = tl.zeros([BLOCK], tl.float32)
    for row in range(first, rows, programs):
        value = tl.load(total + row * width + at, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(d_y + row * width + at, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(roots + row)
        unit = value * root
        d_scale += given * unit
        given = given * scale
        change = root * (given - unit * (tl.sum(given * unit) / width))
        if GIVEN:
            change += tl.load(d_total + row * width + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + row * width + at, change.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_weight + first * width + at, d_scale, mask=inside)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        adds, width = added is not None, x.shape[-1]
        rows, block = x.numel() // width, triton.next_power_of_2(width)
        x, added = x.contiguous(), added.contiguous() if adds else x
        y, roots = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        total = torch.empty_like(x) if adds else x
        how = {"ADDS": adds, "BLOCK": block, "num_warps": _warps(block)}
        _forward[rows,](x, added, weight, total, y, roots, width, eps, **how)
        ctx.save_for_backward(total, weight, roots)
        ctx.adds = adds
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_y is None:
            return d_total, d_total if ctx.adds else None, None, None
        total, weight, roots = ctx.saved_tensors
        width, rows = total.shape[-1], len(roots)
        programs, block = min(rows, PROGRAMS), triton.next_power_of_2(width)
        d_y, given = d_y.contiguous(), d_total is not None
        d_total = d_total.contiguous() if given else d_y
        d_x, d_weight = torch.empty_like(total), weight.new_empty(programs, width)
        how = {"GIVEN": given, "BLOCK": block, "num_warps": _warps(block)}
        _backward[programs,](total, weight, roots, d_y, d_total, d_x, d_weight, rows, width, programs, **how)
        return d_x, d_x if ctx.adds else None, d_weight.sum(0), None


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + added`, or `x` where nothing is added, and `ops.norm.rms_norm` of it, by one kernel.

    What follows goes on from the stream that is returned, so that the backward kernel adds up its gradients.

    Args:
        x, added: Vectors `[..., N]` of one type, at least one.
        weight: Factor on each entry `[N]`, float32.
        eps: Term added under the root.
    """
    return _AddRmsNorm.apply(x, added, weight, eps)
