"""A norm per head, tokens first, and the output gate in one kernel, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS = 32
"""Tokens of a tile."""
TILES = 8
"""Tiles of a program, which has its own sum of the weight's gradient."""


@triton.jit
def _forward(
    y, gate, weight, out, heads, tokens, batch, token_stride, batch_stride, head_stride, eps,
    GATED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    t = (tl.program_id(0) * SIZE + tl.arange(0, SIZE))[:, None].to(tl.int64)
    d = tl.arange(0, D)[None, :]
    inside = t < tokens
    value = tl.load(y + (row * tokens + t) * D + d, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
    value = value * root * tl.load(weight + h * D + d)
    if GATED:
        place = t * token_stride + b * batch_stride + h * head_stride + d
        g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        value = value * g * tl.sigmoid(g)
    tl.store(out + ((t * batch + b) * heads + h) * D + d, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    y, gate, weight, d_out, d_y, d_gate, d_weight, heads, tokens, batch, token_stride, batch_stride, head_stride, eps,
    GATED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    d = tl.arange(0, D)[None, :]
    scale = tl.load(weight + h * D + d)
    total = tl.zeros([D], tl.float32)
    for tile in range(REPEATS):
        t = ((tl.program_id(0) * REPEATS + tile) * SIZE + tl.arange(0, SIZE))[:, None].to(tl.int64)
        inside = t < tokens
        value = tl.load(y + (row * tokens + t) * D + d, mask=inside, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
        unit = value * root
        place = ((t * batch + b) * heads + h) * D + d
        given = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            g = tl.load(gate + t * token_stride + b * batch_stride + h * head_stride + d, mask=inside, other=0.0)
            g = g.to(tl.float32)
            share = tl.sigmoid(g)
            d_g = given * unit * scale * share * (1 + g * (1 - share))
            tl.store(d_gate + place, d_g.to(d_gate.dtype.element_ty), mask=inside)
            given = given * g * share
        total += tl.sum(given * unit, axis=0)
        given = given * scale
        change = root * (given - unit * (tl.sum(given * unit, axis=1) / D)[:, None])
        tl.store(d_y + (row * tokens + t) * D + d, change.to(d_y.dtype.element_ty), mask=inside)
    tl.store(d_weight + (tl.program_id(0) * tl.num_programs(1) + row) * D + tl.arange(0, D), total)


class _Answers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, weight = y.contiguous(), weight.contiguous()
        batch, heads, tokens, dim = y.shape
        out = torch.empty(tokens, batch, heads, dim, dtype=dtype, device=y.device)
        ctx.eps, ctx.gated = eps, gate is not None
        gate = y if gate is None else gate
        strides = gate.stride()[:3] if ctx.gated else (0, 0, 0)
        sizes = (heads, tokens, batch, *strides, eps)
        grid = (triton.cdiv(tokens, TOKENS), batch * heads)
        _forward[grid](y, gate, weight, out, *sizes, GATED=ctx.gated, SIZE=TOKENS, D=dim)
        ctx.save_for_backward(y, gate, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight = ctx.saved_tensors
        batch, heads, tokens, dim = y.shape
        d_y, d_out = torch.empty_like(y), d_out.contiguous()
        d_gate = torch.empty_like(d_out, dtype=gate.dtype) if ctx.gated else d_out
        parts = triton.cdiv(tokens, TOKENS * TILES)
        d_weight = weight.new_empty(parts, batch, heads, dim)
        strides = gate.stride()[:3] if ctx.gated else (0, 0, 0)
        sizes = (heads, tokens, batch, *strides, ctx.eps)
        how = {"GATED": ctx.gated, "SIZE": TOKENS, "D": dim, "REPEATS": TILES, "num_warps": 8}
        _backward[parts, batch * heads](y, gate, weight, d_out, d_y, d_gate, d_weight, *sizes, **how)
        return d_y, d_gate if ctx.gated else None, d_weight.sum((0, 1)), None, None


def gated_answers(y: Tensor, gate: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return `rms_norm(y, weight) * silu(gate)`, tokens first, by one kernel; see `ops.norm.rms_norm`.

    Args:
        y: Answers of heads `[B, H, T, D]`, `T` at least 1.
        gate: Inputs of the output gate `[T, B, H, D]`, whose last dimension lies dense; None for no gate.
        weight: Factor on each entry of each head `[H, D]`, float32.
        eps: Term added under the root.
        dtype: Type of the result `[T, B, H, D]`.
    """
    return _Answers.apply(y, gate, weight, eps, dtype)
