"""Muon against torch's, against its equation, and over heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hopescale.ops.newton_schulz import newton_schulz
from hopescale.optim.muon import Muon, adjusted_lr, iterated_together
from hopescale.optim.stacked import STACK_ELEMENTS

SHAPES = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6)]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def give_gradients(members: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(members):
        p.grad = randn(*p.shape, seed=100 * step + i, dtype=p.dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_it_is_torch_muon_in_bfloat16(nesterov: bool, adjust: str | None, monkeypatch: pytest.MonkeyPatch):
    """Matrices go one by one, by the products that torch takes: a stack is multiplied, and rounded, by others."""
    monkeypatch.setitem(STACK_ELEMENTS, "cpu", 1)
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    rules = Muon(ours, ns_dtype=torch.bfloat16, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(20):
        for members, rule in zip((ours, theirs), rules, strict=True):
            give_gradients(members, step)
            rule.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
        assert torch.equal(
            rules[0].state[left]["momentum_buffer"], rules[1].state[right]["momentum_buffer"]
        )  # so that a state of torch's can be taken over


def test_it_is_torch_muon_in_float64(monkeypatch: pytest.MonkeyPatch):
    """With torch's conversion to bfloat16 taken out."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    rules = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    for step in range(20):
        give_gradients(ours, step)
        rules[0].step()
        give_gradients(theirs, step)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "bfloat16", Tensor.clone)
            rules[1].step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_the_equation(nesterov: bool):
    """The printed momentum, without the factor that Newton-Schulz ignores."""
    weight = nn.Parameter(randn(3, 5, seed=0, dtype=torch.float64))
    rule = Muon([weight], lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=nesterov)
    expected, held = weight.detach().clone(), torch.zeros_like(weight.detach())
    for step in range(4):
        g = randn(3, 5, seed=step + 1, dtype=torch.float64)
        held = 0.9 * held + g
        look = g + 0.9 * held if nesterov else held
        expected = expected - 0.1 * 0.5 * expected - 0.1 * math.sqrt(max(1, 3 / 5)) * newton_schulz(look, 5)
        weight.grad = g
        rule.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_every_head_is_a_matrix():
    heads = nn.Parameter(randn(3, 4, 6, seed=0))
    matrices = [nn.Parameter(part.clone()) for part in heads.detach()]
    rules = Muon([heads], lr=0.1), Muon(matrices, lr=0.1)
    for step in range(3):
        heads.grad = randn(3, 4, 6, seed=step + 1)
        for matrix, grad in zip(matrices, heads.grad, strict=True):
            matrix.grad = grad.clone()
        for rule in rules:
            rule.step()
    torch.testing.assert_close(heads.detach(), torch.stack([m.detach() for m in matrices]), rtol=1e-6, atol=1e-6)


def test_rates_for_shapes():
    assert adjusted_lr(2.0, None, (8, 2)) == adjusted_lr(2.0, "original", (5, 8, 2)) == 4.0
    assert adjusted_lr(2.0, "original", (2, 8)) == 2.0
    assert adjusted_lr(2.0, "match_rms_adamw", (4, 16)) == pytest.approx(1.6)
    # An orthogonal update times that factor has the root mean square it promises.
    update = torch.linalg.qr(randn(16, 4, seed=0))[0] * adjusted_lr(1.0, "match_rms_adamw", (16, 4))
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)
    with pytest.raises(ValueError, match="none_such"):
        Muon([nn.Parameter(torch.zeros(2, 2))], adjust_lr_fn="none_such")


def test_matrices_of_one_shape_or_its_transpose_are_iterated_together():
    """As on a GPU: each comes out as it does alone, and in its own stack."""
    stacks = [
        randn(*shape, seed=index) for index, shape in enumerate([(2, 4, 6), (6, 4), (3, 5), (2, 3, 6, 4), (4, 6)])
    ]
    shapes = []

    def iterate(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return newton_schulz(x)

    found = iterated_together(stacks, iterate)
    assert shapes == [(2 + 1 + 6 + 1, 4, 6), (1, 3, 5)]
    for x, each in zip(stacks, found, strict=True):
        torch.testing.assert_close(each, newton_schulz(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_iterated_together_is_laid_out_as_it_was_for_one_kernel_of_foreach(dtype: torch.dtype):
    stacks = [randn(*shape, seed=index) for index, shape in enumerate([(6, 4), (2, 4, 6), (2, 6, 4), (5, 3)])]
    found = iterated_together(stacks, lambda x: newton_schulz(x, dtype=dtype), dtype)
    alone = [newton_schulz(x, dtype=dtype) for x in stacks]
    for x, each, own in zip(stacks, found, alone, strict=True):
        assert each.dtype == x.dtype and each.stride() == x.stride()
        assert own.stride() == x.stride() or dtype == x.dtype
        torch.testing.assert_close(each, own, rtol=0, atol=5e-2)
