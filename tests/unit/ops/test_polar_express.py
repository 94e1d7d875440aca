"""Polar Express against its polynomials applied to singular values, the polar factor, and Newton-Schulz."""

from __future__ import annotations

import pytest
import torch

from hopescale.ops.limits import steps_on_gram
from hopescale.ops.newton_schulz import newton_schulz
from hopescale.ops.polar_express import COEFFICIENTS, LOWER, coefficients_of, polar_express


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar_factor(x: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def distance(x: torch.Tensor, factor: torch.Tensor) -> float:
    return float((x.double() - factor).norm() / factor.norm())


def with_values(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(randn(rows, columns), full_matrices=False)
    return u @ torch.diag(values.double()) @ v


# A row alone, odd sides, wide and tall beyond and below the ratio from which Gram matrices are iterated on.
@pytest.mark.parametrize("shape", [(1, 5), (7, 7), (9, 13), (5, 17), (17, 5), (16, 63)])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_it_is_the_polynomials_of_the_singular_values(shape: tuple[int, int], steps: int):
    x = randn(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.pow(8).sum() ** (1 / 8)
    for a, b, c in coefficients_of(steps):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(polar_express(x, steps), u @ torch.diag(s) @ v, rtol=1e-9, atol=1e-9)


def test_each_polynomial_is_the_best_of_its_step():
    lower = LOWER
    for step, (a, b, c) in enumerate(COEFFICIENTS[:5]):
        s = torch.linspace(lower, 2 - lower if step else 1, 100_001, dtype=torch.float64)
        error = a * s + b * s**3 + c * s**5 - 1
        lower = 1 + error[0].item()
        if step:
            # An odd quintic is the best if its error is the largest at four places, with signs in turn; the first step
            # is the best from 0.024 on, as less would cost all other values too much.
            largest = error.abs().max().item()
            assert [error[0].item(), error[-1].item()] == pytest.approx([-largest, largest], rel=1e-5, abs=1e-9)
            assert [error.min().item(), error.max().item()] == pytest.approx([-largest, largest], rel=1e-5, abs=1e-9)
            rises = error.diff() > 0
            assert (rises.diff()).sum() == 2 and rises[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 144), (192, 48)])
@pytest.mark.parametrize("decades", [0, 2, 3])
def test_four_steps_come_nearer_than_five_of_newton_schulz(shape: tuple[int, int], decades: int, dtype: torch.dtype):
    values = torch.logspace(0, -decades, min(shape))
    x = with_values(*shape, values) if decades else randn(*shape)
    factor = polar_factor(x)
    ours, theirs = polar_express(x, 4, dtype=dtype), newton_schulz(x, 5, dtype=dtype)
    assert distance(ours, factor) < distance(theirs, factor)
    assert torch.linalg.svdvals(ours).max() < 1.3


def test_many_steps_converge():
    x = with_values(12, 30, torch.logspace(0, -2, 12))
    assert distance(polar_express(x, 8), polar_factor(x)) < 1e-7


@pytest.mark.parametrize("shape", [(4, 4), (3, 11), (11, 3)])
def test_a_batch_is_its_matrices_one_by_one_at_any_scale(shape: tuple[int, int]):
    x = randn(2, 3, *shape)
    before, whole = x.clone(), polar_express(x)
    assert torch.equal(x, before) and whole.shape == x.shape
    for i in range(2):
        torch.testing.assert_close(whole[i, 1], polar_express(x[i, 1] * 10.0 ** (9 * i)), rtol=1e-9, atol=1e-9)
    assert torch.equal(polar_express(torch.zeros(2, *shape)), torch.zeros(2, *shape))


def test_gram_matrices_are_iterated_on_where_that_is_cheaper():
    assert [steps_on_gram(8, columns, 4, low_precision=False) for columns in (8, 12, 13)] == [1, 1, 4]
    assert steps_on_gram(40, 8, 4, low_precision=True) == 2
