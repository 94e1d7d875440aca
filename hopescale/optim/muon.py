"""Muon: an orthogonalised momentum, and the scale of orthogonal updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hopescale.cost.updates import ORTHOGONAL_STEPS
from hopescale.ops.newton_schulz import COEFFICIENTS, EPS, newton_schulz
from hopescale.ops.polar_express import polar_express
from hopescale.optim.stacked import StackedOptimizer


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


def orthogonal(
    x: Tensor,
    orthogonalize: str = "newton_schulz",
    *,
    ns_steps: int | None = None,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    ns_dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace each matrix `U S V^T` of `[..., R, C]` by nearly `U V^T`.

    Args:
        x: Matrices, not changed.
        orthogonalize: Method, `newton_schulz` or `polar_express`.
        ns_steps: Iterations; None is 5 and 4 of them.
        ns_coefficients: Polynomial of each step of `newton_schulz`; the other has its own.
        eps: Least norm a matrix is divided by.
        ns_dtype: Type to iterate in, as the two functions take it.
    """
    steps = ORTHOGONAL_STEPS[orthogonalize] if ns_steps is None else ns_steps
    if orthogonalize == "polar_express":
        return polar_express(x, steps, eps=eps, dtype=ns_dtype)
    return newton_schulz(x, steps, coefficients=ns_coefficients, eps=eps, dtype=ns_dtype)


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
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    orthogonalize: str = "newton_schulz",
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    ns_steps: int | None = None,
    adjust_lr_fn: str | None = None,
    ns_dtype: torch.dtype | None = None,
) -> None:
    """Take one step of Muon (Nested Learning, Eq. 52) with matrices `[..., R, C]`, in place.

        m <- beta m + (1 - beta) g
        W <- (1 - lr wd) W - lr adjust(R, C) NS(u),   u = m, or with Nesterov (1 - beta) g + beta m

    The factor `1 - beta`, torch's convention, changes nothing: Newton-Schulz ignores the scale.

    Args:
        weight: Changed.
        grad: Gradient.
        momentum_buffer: `m`, changed.
        lr: Learning rate.
        weight_decay: Decoupled, per unit of learning rate.
        momentum: `beta`, the decay rate of the momentum per update.
        nesterov: Whether to look ahead.
        orthogonalize, ns_coefficients, ns_steps, ns_dtype: Arguments of `orthogonal`.
        eps: Least norm a matrix is divided by.
        adjust_lr_fn: Factor on the rate; see `adjusted_lr`.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    how = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "eps": eps, "ns_dtype": ns_dtype}
    direction = orthogonal(update, orthogonalize, **how)
    weight.mul_(1 - lr * weight_decay).add_(direction, alpha=-adjusted_lr(lr, adjust_lr_fn, weight.shape))


class Muon(StackedOptimizer):
    """Muon with the settings, the numbers and the state of `torch.optim.Muon`, over stacks and over heads.

    State per parameter: `momentum_buffer` in its shape. Settings: `muon_update`.
    """

    rule = staticmethod(muon_update)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse an `adjust_lr_fn` that there is not."""
        adjusted_lr(settings["lr"], settings["adjust_lr_fn"], (1, 1))

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return a momentum of zeros."""
        return {"momentum_buffer": torch.zeros_like(p)}
