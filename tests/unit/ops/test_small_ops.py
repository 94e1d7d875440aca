"""Convolution, norms and rotation against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hopescale.ops.norm import l2_norm, rms_norm
from hopescale.ops.rope import rope_frequencies, rope_tables, rotate
from hopescale.ops.short_conv import linear_conv, short_conv


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_short_conv_equals_a_grouped_convolution_and_carries_its_tail():
    x, weight = randn(11, 2, 6), randn(6, 4, seed=1)
    padded = F.pad(x.permute(1, 2, 0), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], groups=6)).permute(2, 0, 1)
    zeros = torch.zeros(3, 2, 6, dtype=x.dtype)
    whole, tail = short_conv(x, weight, zeros)
    torch.testing.assert_close(whole, expected)
    assert torch.equal(tail, x[-3:])
    for cut in (1, 2, 7):
        first, middle = short_conv(x[:cut], weight, zeros)
        second, last = short_conv(x[cut:], weight, middle)
        torch.testing.assert_close(torch.cat([first, second]), expected)
        assert torch.equal(last, tail)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_short_conv_has_the_gradient_of_its_equation(tokens: int):
    inputs = [randn(tokens, 2, 6), randn(6, 4, seed=1), randn(3, 2, 6, seed=2)]
    assert torch.autograd.gradcheck(short_conv, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("conv", [short_conv, linear_conv])
def test_a_tail_and_its_gradient_hold_on_to_no_other_inputs(conv):
    given, held = randn(3, 2, 6, seed=2).requires_grad_(), []
    tail = given * 1
    tail.register_hook(lambda gradient: held.append(gradient.untyped_storage().nbytes()))
    y, after = conv(randn(100, 2, 6), randn(6, 4, seed=1), tail)
    y.sum().backward()
    assert after.untyped_storage().nbytes() <= 2 * after.nbytes and after.shape == given.shape
    assert conv is linear_conv or held == [given.nbytes]


FIRST = torch.tensor([[0, 0, 0, 3, 4, 4, 4, 4, 4, 4, 10], [0, 1, 1, 1, 1, 5, 5, 5, 5, 5, 5]], dtype=torch.int32)


def test_a_filter_reads_no_earlier_document():
    x, weight, tail = randn(11, 2, 6), randn(6, 4, seed=1), randn(3, 2, 6, seed=2)
    y, after = short_conv(x, weight, tail, FIRST)
    for row, firsts in enumerate(FIRST.tolist()):
        begins = sorted(set(firsts))
        for begin, end in zip(begins, [*begins[1:], 11], strict=True):
            alone, last = short_conv(x[begin:end, row : row + 1], weight, torch.zeros(3, 1, 6, dtype=x.dtype))
            torch.testing.assert_close(y[begin:end, row : row + 1], alone)
        assert torch.equal(after[:, row : row + 1], last)


def test_a_filter_within_documents_has_the_gradient_of_its_equation():
    inputs = [randn(11, 2, 6), randn(6, 4, seed=1), randn(3, 2, 6, seed=2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *given: short_conv(*given, FIRST), inputs)


def test_short_conv_adds_a_bias_before_silu():
    x, weight, bias = randn(11, 2, 6), randn(6, 4, seed=1), randn(6, seed=3)
    padded = F.pad(x.permute(1, 2, 0), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=6)).permute(2, 0, 1)
    found, _ = short_conv(x, weight, torch.zeros(3, 2, 6, dtype=x.dtype), bias=bias)
    torch.testing.assert_close(found, expected)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, randn(3, 2, 6, seed=2), bias)]
    assert torch.autograd.gradcheck(lambda *given: short_conv(*given[:3], bias=given[3]), inputs)


@pytest.mark.parametrize("within_documents", [True, False])
def test_silu_of_the_linear_convolution_is_the_short_one(within_documents: bool):
    inputs = [randn(11, 2, 6), randn(6, 4, seed=1), randn(3, 2, 6, seed=2)]
    first = torch.tensor([0] * 5 + [5] * 6).expand(2, -1) if within_documents else None
    wanted, wanted_tail = short_conv(*inputs, first, bias=randn(6, seed=3))
    found, tail = linear_conv(*inputs, first, bias=randn(6, seed=3))
    torch.testing.assert_close(F.silu(found), wanted)
    assert torch.equal(tail, wanted_tail)


def test_norms():
    x, weight = randn(3, 8), randn(8, seed=1)
    torch.testing.assert_close(l2_norm(x).norm(dim=-1), torch.ones(3, dtype=x.dtype), rtol=1e-5, atol=0)
    assert torch.isfinite(l2_norm(torch.zeros(2, 4))).all()
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.0), expected)
    low = x.bfloat16()
    assert rms_norm(low, weight.float(), 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_without_gradients_is_the_same(rows: int):
    x, weight = randn(rows, 8).float(), randn(8, seed=1).float()
    expected = rms_norm(x.double(), weight.double(), 0.1)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 0.1).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


def test_rotation_keeps_lengths_and_scores_depend_on_distance_only():
    q, k = randn(6), randn(6, seed=1)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rope_tables(p, 1, rope_frequencies(6, 100.0, torch.device("cpu"))) for p in (i, j)]
        return rotate(q[None], at[0])[0] @ rotate(k[None], at[1])[0]

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-6)
    assert not torch.isclose(score(9, 4), score(9, 5))
    tables = rope_tables(0, 5, rope_frequencies(6, 100.0, torch.device("cpu")))
    x = randn(5, 6)
    torch.testing.assert_close(rotate(x, tables).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
