"""Polar Express: the polar factor of many matrices at once, by the best polynomial of each step, on Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hopescale.ops.limits import steps_on_gram
from hopescale.ops.newton_schulz import EPS, like_before, wide_and_short

LOWER = 3e-3
"""Least singular value, of a largest of 1, that the coefficients are the best for."""
COEFFICIENTS = (
    (8.219101105846, -23.401956720536, 17.158198943221),
    (4.004876059149, -2.922346774508, 0.549118526726),
    (3.523561436193, -2.639803529059, 0.527212834191),
    (2.511527166353, -1.852448356083, 0.438832635580),
    (1.921766531992, -1.301036145217, 0.380139098434),
    (1.875033324663, -1.250037026905, 0.375003702710),
)
"""`a`, `b`, `c` of each step (arXiv 2505.16932, Algorithm 1): `a s + b s^3 + c s^5` is as near to 1 as can be where
singular values from `LOWER` to 1 are after the steps before. Further steps repeat the last."""
MARGIN = 1.02
"""How far above 1 a singular value may be by rounding: a step but the last takes `s / MARGIN`. A value beyond the range
of a step's polynomial grows without bound in the next."""


def coefficients_of(steps: int) -> Iterator[tuple[float, float, float]]:
    """Yield `a`, `b`, `c` of each step, all but those of the last with the margin for rounding."""
    for step in range(steps):
        a, b, c = COEFFICIENTS[min(step, len(COEFFICIENTS) - 1)]
        margin = MARGIN if step + 1 < steps else 1.0
        yield a / margin, b / margin**3, c / margin**5


def polar_express(x: Tensor, steps: int = 4, *, eps: float = EPS, dtype: torch.dtype | None = None) -> Tensor:
    """Replace each matrix `U S V^T` by nearly `U V^T`.

    It differs from `newton_schulz` in three ways. Each step has the polynomial that is the best where singular values
    are by then (arXiv 2505.16932, Algorithm 1). The first step divides by a bound of the largest singular value,
    `|(x x^T)^2|^(1/4)`, whose products it needs anyway, and which is up to 7 times nearer than the norm of a random
    matrix of 512 rows. And where a matrix is wide, steps are taken on its Gram matrix: with `p = a + b g + c g^2` and
    `g = y y^T`, a step maps `g` to `p g p`, and only the product of all `p` is applied to `y` (Appendix F), in bfloat16
    after every second step.

    Args:
        x: Matrices `[..., R, C]`, not changed.
        steps: Number of iterations; 4 come nearer than 5 of `newton_schulz`.
        eps: Least Frobenius norm a matrix is divided by.
        dtype: Type to iterate in. None is bfloat16 on CUDA; elsewhere float32, or float64 if `x` is.

    Returns:
        `[..., R, C]` in the dtype of `x`.
    """
    y, tall = wide_and_short(x, eps, dtype)
    shape = y.shape
    y = y.reshape(-1, *shape[-2:])
    together = steps_on_gram(*shape[-2:], steps, low_precision=y.dtype == torch.bfloat16)
    coefficients = list(coefficients_of(steps))
    for start in range(0, steps, together):
        y = _steps(y, coefficients[start : start + together], begins=start == 0)
    return like_before(y.reshape(shape), tall, x.dtype)


def _steps(y: Tensor, coefficients: list[tuple[float, float, float]], *, begins: bool) -> Tensor:
    """Take steps on the Gram matrix of `y` `[K, R, C]`; the first of all also brings the largest value below 1."""
    gram, whole = y @ y.mT, None
    for step, (a, b, c) in enumerate(coefficients):
        square = gram @ gram
        if begins and step == 0:
            wide = torch.promote_types(square.dtype, torch.float32)
            bound = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True, dtype=wide).sqrt()
            # Of a matrix of zeros the bound is 0.
            bound = torch.where(bound > 0, bound, 1.0)
            y, gram, square = (each / (bound**power).to(y.dtype) for each, power in ((y, 0.5), (gram, 1), (square, 2)))
        p = b * gram + c * square
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = p if whole is None else p @ whole
        if step + 1 < len(coefficients):
            gram = (p @ gram) @ p
    return y if whole is None else whole @ y
