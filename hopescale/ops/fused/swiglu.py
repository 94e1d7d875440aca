"""A gated map, `silu(gate x) * up x`: two products, and one kernel for the rest, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024


@triton.jit
def _forward(gate, up, y, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, d_y, d_gate, d_up, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(d_gate + at, (d * u * share * (1 + g * (1 - share))).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * g * share).to(d_up.dtype.element_ty), mask=inside)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        y, count = torch.empty_like(gate), gate.numel()
        _forward[triton.cdiv(count, BLOCK),](gate, up, y, count, SIZE=BLOCK)
        ctx.save_for_backward(x, gate_weight, up_weight, gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate_weight, up_weight, gate, up = ctx.saved_tensors
        d_gate, d_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        _backward[triton.cdiv(count, BLOCK),](gate, up, d_y.contiguous(), d_gate, d_up, count, SIZE=BLOCK)
        rows, d_gate, d_up = x.flatten(0, -2), d_gate.flatten(0, -2), d_up.flatten(0, -2)
        # The second product adds to the first as it is made.
        d_x = (d_gate @ gate_weight).addmm_(d_up, up_weight)
        return d_x.view(x.shape), d_gate.mT @ rows, d_up.mT @ rows


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Return `silu(x gate_weight^T) * (x up_weight^T)`, all between the products by one kernel.

    Args:
        x: Vectors `[..., N]`, at least one.
        gate_weight, up_weight: Matrices `[F, N]` of the same type.
    """
    return _Swiglu.apply(x, gate_weight, up_weight)
