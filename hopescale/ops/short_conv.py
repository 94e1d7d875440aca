"""Causal depthwise convolution over a few tokens, with its last inputs carried from call to call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ConvSilu(torch.autograd.Function):
    """Convolves time-first inputs and applies SiLU: one pass per tap, nothing transposed."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        mixed = _convolve(padded, weight)
        return mixed.mul_(torch.sigmoid(mixed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        width, tokens = weight.shape[1], grad.shape[0]
        d_mixed = torch.ops.aten.silu_backward(grad.contiguous(), _convolve(padded, weight))
        d_padded, taps = torch.zeros_like(padded), []
        for tap in range(width):
            d_padded[tap : tap + tokens].addcmul_(d_mixed, weight[:, tap])
            taps.append((d_mixed * padded[tap : tap + tokens]).sum((0, 1)))
        return d_padded, torch.stack(taps, dim=1)


def _convolve(padded: Tensor, weight: Tensor) -> Tensor:
    width = weight.shape[1]
    tokens = padded.shape[0] - width + 1
    mixed = padded[:tokens] * weight[:, 0]
    for tap in range(1, width):
        mixed.addcmul_(padded[tap : tap + tokens], weight[:, tap])
    return mixed


def short_conv(x: Tensor, weight: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel over time and apply SiLU.

    Args:
        x: Inputs, time first: `[T, B, N]`.
        weight: One filter per channel, oldest token first: `[N, W]`.
        tail: The `W - 1` inputs before `x`: `[W - 1, B, N]`.

    Returns:
        Outputs `[T, B, N]` and the tail for the next call.
    """
    padded = torch.cat([tail.to(x.dtype), x])  # [W - 1 + T, B, N]
    return _ConvSilu.apply(padded, weight), padded[x.shape[0] :]
