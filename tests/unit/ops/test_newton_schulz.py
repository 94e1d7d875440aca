"""Newton-Schulz against its polynomial applied to singular values, and against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from hopescale.ops.newton_schulz import COEFFICIENTS, EPS, newton_schulz

SHAPES = [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (32, 64)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_singular_values(x: torch.Tensor, steps: int, coefficients: tuple[float, float, float]) -> torch.Tensor:
    a, b, c = coefficients
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("steps", "coefficients"), [(5, COEFFICIENTS), (1, COEFFICIENTS), (3, (1.5, -0.5, 0.0))])
def test_it_is_a_polynomial_of_the_singular_values(
    shape: tuple[int, int], steps: int, coefficients: tuple[float, float, float]
):
    x = randn(*shape)
    expected = by_singular_values(x, steps, coefficients)
    torch.testing.assert_close(newton_schulz(x, steps, coefficients=coefficients), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, int]):
    x = randn(2, 3, *shape)
    batched = newton_schulz(x)
    assert batched.shape == x.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batched[i, j], newton_schulz(x[i, j]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_matrix_gives_the_bits_of_torch_in_bfloat16(shape: tuple[int, int]):
    x = randn(*shape, dtype=torch.float32)
    expected = torch_newton_schulz(x, COEFFICIENTS, 5, EPS)
    for given in (x, x[None]):
        ours = newton_schulz(given, dtype=torch.bfloat16)
        assert ours.dtype == torch.float32
        assert torch.equal(ours.reshape(shape), expected.float())


def test_five_steps_bring_singular_values_near_one():
    # Square, and not too close to singular: the smallest values need more steps.
    u, _, v = torch.linalg.svd(randn(8, 8))
    x = u @ torch.diag(torch.logspace(-1, 2, 8, dtype=torch.float64)) @ v
    values = torch.linalg.svdvals(newton_schulz(x))
    assert values.min() > 0.3 and values.max() < 1.3
    assert values[1:6].min() > 0.6


def test_scale_has_no_influence_and_zeros_stay_zeros():
    x = randn(3, 4, 6)
    torch.testing.assert_close(newton_schulz(1e-3 * x), newton_schulz(1e3 * x), rtol=1e-10, atol=1e-12)
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_precision_of_the_iteration():
    x = randn(4, 6, dtype=torch.float32)
    before = x.clone()
    wide = newton_schulz(x.double())
    assert wide.dtype == torch.float64
    assert (newton_schulz(x).double() - wide).abs().max() < 1e-5
    assert 1e-5 < (newton_schulz(x, dtype=torch.bfloat16).double() - wide).abs().max() < 0.1
    assert newton_schulz(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(x, before)
