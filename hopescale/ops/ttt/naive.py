"""Test-time training token by token, its inner gradient taken by autograd. Slow; the reference for the dual form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.ttt.types import TttMemory, TttState, TttStreams, TttWeights


def ttt_naive(streams: TttStreams, state: TttState, memory: TttMemory, *, position: int = 0) -> tuple[Tensor, TttState]:
    """Run test-time training as a loop over tokens. Same arguments and result as `ttt`, of one document."""
    weights, sums = state
    outputs, size = [], len(memory.scale)
    for t, (q, k, v, rate) in enumerate(streams.split([1] * streams.q.shape[2])):
        place = (position + t) % size
        fixed = weights.map(lambda x: x if x.requires_grad else x.detach().requires_grad_())
        with torch.enable_grad():
            error = _answer(fixed, k, memory) - v
            gradients = torch.autograd.grad(
                0.5 * error.square().sum(), [x for x in fixed if x is not None], create_graph=True
            )
        gradient = TttWeights(*gradients, *[None] * (4 - len(gradients)))
        sums = sums.map(lambda x, g, r=rate: x + r[..., None] * g, gradient)
        moved = weights.map(lambda x, g, p=place: x - memory.scale[p] * g, sums)
        outputs.append(_answer(moved, q, memory))
        if place == size - 1:
            weights, sums = moved, sums.map(torch.zeros_like)
    return torch.cat(outputs, dim=2) if outputs else streams.q, TttState(weights, sums)


def _answer(weights: TttWeights, x: Tensor, memory: TttMemory) -> Tensor:
    """Answer `x` `[B, H, 1, D]`: `x + LN(f(x))`."""
    z = x @ weights.w1 + weights.b1
    if weights.w2 is not None:
        z = F.gelu(z, approximate="tanh") @ weights.w2 + weights.b2
    z = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, correction=0, keepdim=True) + memory.eps)
    return x + memory.gamma * z + memory.beta
