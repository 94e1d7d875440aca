"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised, over a second moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hopescale.ops.newton_schulz import COEFFICIENTS
from hopescale.optim.muon import adjusted_lr, corrected_root, move, orthogonal, scale_to_rms
from hopescale.optim.stacked import StackedOptimizer

UPDATE_RMS = 0.2
"""Root mean square of an update before the learning rate; AdamW's updates are about as large (arXiv 2502.16982)."""


def m3_update(
    weight: list[Tensor],
    grad: list[Tensor],
    step: list[int],
    fast_momentum: list[Tensor],
    slow_momentum: list[Tensor] | None = None,
    slow_direction: list[Tensor] | None = None,
    second_moment: list[Tensor] | None = None,
    *,
    lr: float,
    beta1: float = 0.95,
    beta2: float = 0.95,
    beta3: float = 0.5,
    alpha_slow: float = 0.5,
    frequency: int = 4,
    form: Literal["ema", "paper"] = "ema",
    nesterov: bool = False,
    update_rms: float | None = None,
    adjust_lr_fn: str | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    orthogonalize: str = "newton_schulz",
    ns_steps: int | None = None,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    ns_dtype: torch.dtype | None = None,
) -> None:
    """Take one step of M3 (Nested Learning, Algorithm 1) with stacks of matrices `[..., R, C]`, in place.

        paper:  M1 <- M1 + b1 g            V <- V + b2 g^2            each f steps  M2 <- M2 + b3 sum(last f g)
        ema:    M1 <- b1 M1 + (1 - b1) g   V <- b2 V + (1 - b2) g^2   each f steps  M2 <- b3 M2 + (1 - b3) sum(...) / f
        both:   O = (NS(M1) + alpha_slow NS(M2)) / (sqrt(V) + eps)    W <- (1 - lr wd) W - lr c O

    The slow memory takes in the gradients of `f` steps when they are over; the `f` steps that follow use it. Until then
    they are added to `slow_momentum` one by one, while `slow_direction` holds the `NS(M2)` in use. With `ema`, `V` is
    corrected for its start at zero; momenta need no correction, as Newton-Schulz ignores their scale.

    Args:
        weight: Changed.
        grad: Gradient.
        step: Number of this update, counted from 1.
        fast_momentum: `M1`, changed.
        slow_momentum: `M2` with the gradients that wait, changed; None leaves the slow memory out.
        slow_direction: `NS(M2)`, changed; None with `slow_momentum`.
        second_moment: `V`, changed; None divides by nothing.
        lr: Learning rate.
        beta1: `b1`, the decay rate of `M1` per update; with `paper` the weight of a gradient.
        beta2: `b2`, the same of `V`.
        beta3: `b3`, the same of `M2` per period: it looks back over `frequency / (1 - beta3)` updates.
        alpha_slow: Weight of the slow memory's direction; 0 leaves the slow memory out.
        frequency: `f`, in updates of this parameter.
        form: Moments as exponential averages, or the sums of Algorithm 1 to the letter, which only grow.
        nesterov: Whether `O` has `(1 - b1) g + b1 M1` for `M1`; `ema` only.
        update_rms: Root mean square to which `c` scales each matrix; None does not. `ema` only.
        adjust_lr_fn: Muon's factor of the shape (`adjusted_lr`) as `c`, in place of `update_rms`; `ema` only.
        eps: Added to the root of `V`.
        weight_decay: Decoupled, per unit of learning rate.
        orthogonalize, ns_steps, ns_coefficients, ns_dtype: Arguments of `orthogonal`.
    """
    how = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "ns_dtype": ns_dtype}
    _write_fast(fast_momentum, grad, beta1, form)
    ahead = torch._foreach_lerp(grad, fast_momentum, beta1) if nesterov else fast_momentum
    ended = []
    if slow_momentum is not None:
        _write_slowly(slow_momentum, grad, step, beta3, frequency, form)
        ended = [place for place, number in enumerate(step) if number % frequency == 0]
    directions = orthogonal([*ahead, *(slow_momentum[place] for place in ended)], orthogonalize, **how)
    update = directions[: len(weight)]
    if slow_momentum is not None:
        torch._foreach_add_(update, slow_direction, alpha=alpha_slow)
    if ended:
        torch._foreach_copy_([slow_direction[place] for place in ended], directions[len(weight) :])
    if second_moment is not None:
        _divide(update, second_moment, grad, step, beta2, eps, form)
    if update_rms is not None:
        scale_to_rms(update, update_rms)
    rates = [lr if adjust_lr_fn is None else adjusted_lr(lr, adjust_lr_fn, each.shape) for each in weight]
    move(weight, update, 1 - lr * weight_decay, rates)


def _write_fast(fast_momentum: list[Tensor], grad: list[Tensor], beta1: float, form: str) -> None:
    """Take gradients into fast momenta."""
    if form == "paper":
        torch._foreach_add_(fast_momentum, grad, alpha=beta1)
    else:
        torch._foreach_lerp_(fast_momentum, grad, 1 - beta1)


def _write_slowly(
    slow_momentum: list[Tensor], grad: list[Tensor], step: list[int], beta3: float, frequency: int, form: str
) -> None:
    """Add gradients to slow momenta, which fade at the first of each period."""
    if form == "paper":
        torch._foreach_add_(slow_momentum, grad, alpha=beta3)
        return
    if begun := [each for each, number in zip(slow_momentum, step, strict=True) if (number - 1) % frequency == 0]:
        torch._foreach_mul_(begun, beta3)
    torch._foreach_add_(slow_momentum, grad, alpha=(1 - beta3) / frequency)


def _divide(
    update: list[Tensor],
    second_moment: list[Tensor],
    grad: list[Tensor],
    step: list[int],
    beta2: float,
    eps: float,
    form: str,
) -> None:
    """Take gradients into second moments, and divide updates by their roots."""
    if form == "paper":
        torch._foreach_addcmul_(second_moment, grad, grad, value=beta2)
        root = torch._foreach_sqrt(second_moment)
    else:
        root = corrected_root(second_moment, grad, step, beta2)
    torch._foreach_add_(root, eps)
    torch._foreach_div_(update, root)


class M3(StackedOptimizer):
    """M3 (Nested Learning, section 7.2).

    State per parameter: `step`, and in its shape `fast_momentum`, `slow_momentum` and `slow_direction` (unless
    `alpha_slow` is 0), `second_moment` (if there is one). A period of the slow memory counts the updates of the
    parameter itself.

    Newton-Schulz has made directions equal before the second moment divides: entries with small gradients get large
    updates. Noise evens it out; with gradients free of noise progress is slow, and without the second moment it is not.

    Args:
        params: Parameters `[..., R, C]`.
        lr: Learning rate.
        second_moment: Whether to divide by the root of the second moment.
        settings: Settings of `m3_update`; with `ema` and no `adjust_lr_fn`, `update_rms` is 0.2 unless it is given.

    Raises:
        ValueError: If a parameter is no matrix, or settings contradict each other.
    """

    rule = staticmethod(m3_update)

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *, second_moment: bool = True, **settings: Any):
        self._has_second_moment = second_moment
        super().__init__(params, lr, **settings)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse settings that contradict each other, and choose the scale of updates."""
        form, rms, adjust_lr_fn = (settings[name] for name in ("form", "update_rms", "adjust_lr_fn"))
        if form not in ("ema", "paper"):
            raise ValueError(f"form is {form!r}; it can be ema or paper")
        if form == "paper" and (settings["nesterov"] or rms is not None or adjust_lr_fn is not None):
            raise ValueError("nesterov, update_rms and adjust_lr_fn belong to form='ema'; Algorithm 1 has none of them")
        if rms is not None and adjust_lr_fn is not None:
            raise ValueError(f"update_rms={rms} and adjust_lr_fn={adjust_lr_fn!r} both set the scale; give one")
        if settings["frequency"] < 1:
            raise ValueError(f"frequency is {settings['frequency']}; a period is at least one update")
        adjusted_lr(settings["lr"], adjust_lr_fn, (1, 1))
        if form == "ema" and rms is None and adjust_lr_fn is None:
            settings["update_rms"] = UPDATE_RMS

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return moments of zeros."""
        names = ["fast_momentum"]
        if group["alpha_slow"]:
            names += ["slow_momentum", "slow_direction"]
        if self._has_second_moment:
            names.append("second_moment")
        return {"step": torch.tensor(0.0)} | {name: torch.zeros_like(p) for name in names}
