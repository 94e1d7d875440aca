"""Muon: an orthogonalised momentum, and the scale of orthogonal updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hopescale.cost.updates import ORTHOGONAL_STEPS
from hopescale.ops.newton_schulz import COEFFICIENTS, EPS, iteration_dtype, like_before, newton_schulz
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
    stacks: Sequence[Tensor],
    orthogonalize: str = "newton_schulz",
    *,
    ns_steps: int | None = None,
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    ns_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Replace each matrix `U S V^T` of stacks `[..., R, C]` by nearly `U V^T`.

    On a GPU, matrices of one shape, or of that of their transposes, are iterated together, whatever stack they are of.
    A CPU gains nothing by it.

    Args:
        stacks: Matrices, not changed.
        orthogonalize: Method, `newton_schulz` or `polar_express`.
        ns_steps: Iterations; None is 5 and 4 of them.
        ns_coefficients: Polynomial of each step of `newton_schulz`; the other has its own.
        eps: Least norm a matrix is divided by.
        ns_dtype: Type to iterate in, as the two functions take it.
    """
    steps = ORTHOGONAL_STEPS[orthogonalize] if ns_steps is None else ns_steps

    def iterate(x: Tensor) -> Tensor:
        if orthogonalize == "polar_express":
            return polar_express(x, steps, eps=eps, dtype=ns_dtype)
        return newton_schulz(x, steps, coefficients=ns_coefficients, eps=eps, dtype=ns_dtype)

    if all(x.device.type == "cpu" for x in stacks):
        return [iterate(x) for x in stacks]
    return iterated_together(stacks, iterate, ns_dtype)


def iterated_together(
    stacks: Sequence[Tensor], iterate: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return what a function of matrices `[K, r, c]`, wide ones or square, makes of those of stacks `[..., R, C]`.

    It is called once for each shape. Transposes of tall matrices are wide; what becomes of them is transposed again and
    laid out anew, because foreach launches one kernel for lists of tensors that are laid out alike.

    Args:
        stacks: Matrices, not changed.
        iterate: The function, which computes in `dtype`.
        dtype: Type as of `iteration_dtype`.
    """
    alike: dict[tuple, list[int]] = defaultdict(list)
    for place, x in enumerate(stacks):
        alike[*sorted(x.shape[-2:]), x.dtype].append(place)
    result: dict[int, Tensor] = {}
    for places in alike.values():
        first = stacks[places[0]]
        halves = [[place for place in places if _is_tall(stacks[place]) == is_tall] for is_tall in (False, True)]
        wide = [stacks[place] for place in halves[0]] + [stacks[place].mT for place in halves[1]]
        wide = [x.reshape(-1, *x.shape[-2:]) for x in wide]
        joined = torch.cat(wide) if len(wide) > 1 else wide[0]
        num_wide = sum(map(len, wide[: len(halves[0])]))
        joined = iterate(joined.to(iteration_dtype(first, dtype)))
        for members, half, is_tall in zip(halves, (joined[:num_wide], joined[num_wide:]), (False, True), strict=True):
            counts = [stacks[place].shape[:-2].numel() for place in members]
            parts = like_before(half, is_tall, first.dtype).contiguous().split(counts) if members else ()
            result |= {place: part.view(stacks[place].shape) for place, part in zip(members, parts, strict=True)}
    return [result[place] for place in range(len(stacks))]


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def scale_to_rms(update: Sequence[Tensor], rms: float) -> None:
    """Scale each matrix of stacks `[..., R, C]` to a root mean square, in place; zeros stay zeros."""
    found = [square.mean(dim=(-2, -1), keepdim=True) for square in torch._foreach_mul(update, update)]
    torch._foreach_sqrt_(found)
    torch._foreach_clamp_min_(found, torch.finfo(found[0].dtype).tiny)
    torch._foreach_reciprocal_(found)
    torch._foreach_mul_(found, rms)
    torch._foreach_mul_(update, found)


def corrected_root(
    second_moment: Sequence[Tensor], grad: Sequence[Tensor], step: Sequence[int], beta2: float
) -> list[Tensor]:
    """Add gradients to the means of their squares, and return the roots, corrected for the start at zero."""
    torch._foreach_mul_(second_moment, beta2)
    torch._foreach_addcmul_(second_moment, grad, grad, value=1 - beta2)
    root = torch._foreach_sqrt(second_moment)
    torch._foreach_div_(root, [(1 - beta2**number) ** 0.5 for number in step])
    return root


def move(weight: Sequence[Tensor], update: Sequence[Tensor], kept: float, rates: Sequence[float]) -> None:
    """Multiply weights by what is kept of them, and move them against updates, each by its rate."""
    torch._foreach_mul_(weight, kept)
    for rate in dict.fromkeys(rates):
        places = [place for place, each in enumerate(rates) if each == rate]
        torch._foreach_add_([weight[place] for place in places], [update[place] for place in places], alpha=-rate)


def muon_update(
    weight: list[Tensor],
    grad: list[Tensor],
    momentum_buffer: list[Tensor],
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
    """Take one step of Muon (Nested Learning, Eq. 52) with stacks of matrices `[..., R, C]`, in place.

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
    torch._foreach_lerp_(momentum_buffer, grad, 1 - momentum)
    update = torch._foreach_lerp(grad, momentum_buffer, momentum) if nesterov else momentum_buffer
    how = {"ns_steps": ns_steps, "ns_coefficients": ns_coefficients, "eps": eps, "ns_dtype": ns_dtype}
    directions = orthogonal(update, orthogonalize, **how)
    move(weight, directions, 1 - lr * weight_decay, [adjusted_lr(lr, adjust_lr_fn, each.shape) for each in weight])


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
