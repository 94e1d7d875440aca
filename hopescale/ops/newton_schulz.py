"""Newton-Schulz iteration: push the singular values of many matrices towards 1 at once."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Muon's quintic: steepest at 0 rather than convergent; singular values end between 0.7 and 1.2."""
EPS = 1e-7


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = EPS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace each matrix `U S V^T` by nearly `U V^T`.

    Each step maps singular values by `a s + b s^3 + c s^5`, on the smaller side of the matrix (Nested Learning, Eq. 52;
    Muon, https://kellerjordan.github.io/posts/muon/). The scale of a matrix has no influence; zeros stay zeros.

    Args:
        x: Matrices `[..., R, C]`, not changed.
        steps: Number of iterations; 5 is enough for training.
        coefficients: `a`, `b`, `c`.
        eps: Least Frobenius norm a matrix is divided by.
        dtype: Type to iterate in. None is bfloat16 on CUDA; elsewhere float32, or float64 if `x` is.

    Returns:
        `[..., R, C]` in the dtype of `x`.
    """
    a, b, c = coefficients
    y, tall = wide_and_short(x, eps, dtype)
    shape = y.shape
    alone = shape.numel() == shape[-2] * shape[-1]
    # What torch.optim.Muon calls, so that one matrix gives the same bits.
    multiply, multiply_add = (torch.mm, torch.addmm) if alone else (torch.bmm, torch.baddbmm)
    y = y.reshape(shape[-2:] if alone else (-1, *shape[-2:]))
    for _ in range(steps):
        gram = multiply(y, y.mT)
        y = multiply_add(y, multiply_add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return like_before(y.reshape(shape), tall, x.dtype)


def wide_and_short(x: Tensor, eps: float, dtype: torch.dtype | None) -> tuple[Tensor, bool]:
    """Return matrices with no more rows than columns, of norm 1 at most, and whether they were transposed for it.

    Args:
        x: Matrices `[..., R, C]`, not changed.
        eps: Least Frobenius norm a matrix is divided by.
        dtype: Type of the result. None is bfloat16 on CUDA; elsewhere float32, or float64 if `x` is.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.to(iteration_dtype(x, dtype))
    y = y.mT if tall else y
    return y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp_min(eps), tall


def iteration_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the type to iterate in: bfloat16 on CUDA and else float32, or float64 if `x` is, if there is no other."""
    if dtype is None:
        return torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    return dtype


def like_before(y: Tensor, tall: bool, dtype: torch.dtype) -> Tensor:
    """Return matrices in a type, transposed again if they were; one after the other in memory if the type is new."""
    return (y.mT if tall else y).to(dtype, memory_format=torch.contiguous_format)
