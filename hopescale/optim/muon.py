"""Muon: an orthogonalised momentum, and the scale of orthogonal updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hopescale.ops.newton_schulz import COEFFICIENTS, EPS, newton_schulz
from hopescale.optim.stacked import StackedOptimizer, settings


def adjusted_lr(lr: float, adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """Return the rate for orthogonal updates of matrices of a shape.

    Args:
        lr: Learning rate of the group.
        adjust_lr_fn: Factor on it. `original` (or None) is `sqrt(max(1, R / C))`, larger for tall matrices;
            `match_rms_adamw` is `0.2 sqrt(max(R, C))`, which makes the root mean square of an update 0.2, so that
            AdamW's rates fit (arXiv 2502.16982).
        shape: `[..., R, C]`.

    Raises:
        ValueError: If there is no such function.
    """
    rows, columns = shape[-2:]
    if adjust_lr_fn in (None, "original"):
        return lr * math.sqrt(max(1, rows / columns))
    if adjust_lr_fn == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}; it can be original or match_rms_adamw")


def scale_to_rms(update: Tensor, rms: float) -> None:
    """Scale each matrix of `[..., R, C]` to a root mean square, in place; zeros stay zeros."""
    found = update.square().mean(dim=(-2, -1), keepdim=True).sqrt_()
    update.mul_(rms / found.clamp_min(torch.finfo(found.dtype).tiny))


def muon_update(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
    ns_dtype: torch.dtype | None,
) -> None:
    """Take one step of Muon (Nested Learning, Eq. 52) with matrices `[..., R, C]`, in place.

        m <- beta m + (1 - beta) g
        W <- (1 - lr wd) W - lr adjust(R, C) NS(u),   u = m, or with Nesterov (1 - beta) g + beta m

    The factor `1 - beta`, torch's convention, changes nothing: Newton-Schulz ignores the scale.

    Args:
        weight: Changed.
        grad: Gradient.
        momentum_buffer: `m`, changed.
        momentum: `beta`. It and the others are settings of `Muon`.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    direction = newton_schulz(update, ns_steps, coefficients=ns_coefficients, eps=eps, dtype=ns_dtype)
    weight.mul_(1 - lr * weight_decay).add_(direction, alpha=-adjusted_lr(lr, adjust_lr_fn, weight.shape))


class Muon(StackedOptimizer):
    """Muon with the arguments, the numbers and the state of `torch.optim.Muon`, over stacks and over heads.

    State per parameter: `momentum_buffer` in its shape.

    Args:
        params: Parameters `[..., R, C]`.
        lr: Learning rate.
        weight_decay: Decoupled, per unit of learning rate.
        momentum: Decay rate of the momentum per update.
        nesterov: Whether to look ahead.
        ns_coefficients: Of Newton-Schulz.
        eps: Least norm a matrix is divided by.
        ns_steps: Iterations of Newton-Schulz.
        adjust_lr_fn: See `adjusted_lr`.
        ns_dtype: In which Newton-Schulz runs; None is bfloat16 on CUDA and the parameter's precision elsewhere.

    Raises:
        ValueError: If a parameter is no matrix, or there is no such `adjust_lr_fn`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = EPS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
    ):
        adjusted_lr(lr, adjust_lr_fn, (1, 1))
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros."""
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(
        self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor], step: int | None
    ) -> None:
        """Update a stack in place."""
        muon_update(weight, grad, **state, **settings(group))
