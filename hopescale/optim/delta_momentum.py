"""Delta Momentum: a momentum that forgets its part along the present gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hopescale.optim.muon import corrected_root
from hopescale.optim.stacked import StackedOptimizer


def delta_momentum_update(
    weight: list[Tensor],
    grad: list[Tensor],
    momentum_buffer: list[Tensor],
    step: list[int],
    second_moment: list[Tensor] | None = None,
    *,
    lr: float,
    momentum: float = 0.9,
    delta: float = 0.1,
    form: Literal["unit", "paper"] = "unit",
    beta2: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Take one step of Delta Momentum (Nested Learning, Eq. 48 and 49) with stacks `[..., R, C]`, in place.

        m <- m (alpha I - delta g^T g / |g|^2) - lr P g
        W <- (1 - lr wd) W + m

    `|g|` is the Frobenius norm of the matrix, so the erase is between 0 and `delta` along any direction, and the scale
    of a gradient does not decide what is forgotten. `paper` leaves the division out: as printed with `delta` 1, and
    unstable as soon as the largest singular value of `g` exceeds `sqrt(1 + alpha)`. `delta` 0 is plain momentum.

    Args:
        weight: Changed.
        grad: `g`.
        momentum_buffer: `m`, changed; it carries the learning rate and the sign of a step.
        step: Number of this update, counted from 1.
        second_moment: `V <- beta2 V + (1 - beta2) g^2`, changed; then `P g` is `g / (sqrt(V) + eps)`, with `V`
            corrected for its start at zero. None makes `P` the identity.
        lr: Learning rate.
        momentum: `alpha`, the decay rate of the momentum per update.
        delta: Strength of the erase along the gradient; 0 is plain momentum.
        form: `unit` divides the erase by `|g|^2`; `paper` does not (Eq. 49 is `delta` 1).
        beta2: Decay rate of `V`, which preconditions what is written; None writes the gradient.
        eps: Added to the root of `V`.
        weight_decay: Decoupled, per unit of learning rate.
    """
    held = [_along(each, g) for each, g in zip(momentum_buffer, grad, strict=True)]
    if form == "unit":
        squares = [g.square().sum(dim=(-2, -1), keepdim=True) for g in grad]
        torch._foreach_clamp_min_(squares, torch.finfo(squares[0].dtype).tiny)
        torch._foreach_div_(held, squares)
    value = grad
    if second_moment is not None:
        root = corrected_root(second_moment, grad, step, beta2)
        torch._foreach_add_(root, eps)
        value = torch._foreach_div(grad, root)
    torch._foreach_mul_(momentum_buffer, momentum)
    torch._foreach_sub_(momentum_buffer, held, alpha=delta)
    torch._foreach_sub_(momentum_buffer, value, alpha=lr)
    torch._foreach_mul_(weight, 1 - lr * weight_decay)
    torch._foreach_add_(weight, momentum_buffer)


def _along(momentum: Tensor, g: Tensor) -> Tensor:
    """Return `m g^T g`, by the smaller of the two products in the middle, `[R, R]` or `[C, C]`."""
    return (momentum @ g.mT) @ g if g.shape[-2] <= g.shape[-1] else momentum @ (g.mT @ g)


class DeltaMomentum(StackedOptimizer):
    """Delta Momentum (Nested Learning, section 4.4).

    State per parameter: `step`, `momentum_buffer` and, with `beta2`, `second_moment`, both in its shape. The learning
    rate is part of the momentum, as printed: when it changes, steps follow with the momentum's delay. Settings:
    `delta_momentum_update`.
    """

    rule = staticmethod(delta_momentum_update)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse a form that there is not."""
        if settings["form"] not in ("unit", "paper"):
            raise ValueError(f"form is {settings['form']!r}; it can be unit or paper")

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return moments of zeros."""
        names = ["momentum_buffer"] if group["beta2"] is None else ["momentum_buffer", "second_moment"]
        return {"step": torch.tensor(0.0)} | {name: torch.zeros_like(p) for name in names}
