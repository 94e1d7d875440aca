"""Normalisations over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
from torch import Tensor


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale vectors to unit length: `x / sqrt(|x|^2 + eps)`."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale vectors to unit root mean square, times `weight`. Returns the type of `x`."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
