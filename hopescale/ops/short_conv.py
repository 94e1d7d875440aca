"""Causal depthwise convolution over a few tokens, with its last inputs carried from call to call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    mixed = F.conv1d(padded.permute(1, 2, 0), weight[:, None], groups=weight.shape[0])  # [B, N, T]
    return F.silu(mixed).permute(2, 0, 1), padded[x.shape[0] :]
