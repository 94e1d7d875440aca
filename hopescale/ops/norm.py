"""Normalisations over the last dimension, computed in float32 (float64 stays float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.ops.vectors import are_few, can_map, cpp_rms_norm, is_plain


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale vectors to unit length: `x / sqrt(|x|^2 + eps)`."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale vectors to unit root mean square, times `weight`. Returns the type of `x`."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled():
        return _rms_norm_without_gradients(x, weight, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def _rms_norm_without_gradients(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do the same with fewer tensors, which take longer to make than to compute where a single vector is scaled."""
    fits = weight.shape == x.shape[-1:] and is_plain(weight)
    if fits and (torch.get_num_threads() == 1 or are_few(x)) and can_map(x):
        return cpp_rms_norm(x, weight, eps)
    return (x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
