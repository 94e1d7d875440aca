"""Delta gradient descent against Eq. 57, against the minimum it is, and with Gram matrices from real layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.dgd import DGD, dgd_update
from hopescale.optim.gram import accumulate_gram


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 100.0])
def test_a_single_token_gives_the_printed_update(lr: float):
    w, x, slope = randn(3, 4, seed=0), randn(4, seed=1), randn(3, seed=2)
    expected, rate = [[0.0] * 4 for _ in range(3)], lr / (1 + lr * sum(v * v for v in x.tolist()))
    for i in range(3):
        along = sum(w[i, k].item() * x[k].item() for k in range(4))
        for j in range(4):
            expected[i][j] = (w[i, j] - rate * along * x[j] - rate * slope[i] * x[j]).item()
    dgd_update(w, torch.outer(slope, x), torch.outer(x, x), lr=lr)
    torch.testing.assert_close(w, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["surprise", "residual"])
def test_a_batch_gives_the_minimum_of_the_objective(target: str):
    start, x, slopes, lr = randn(3, 4, seed=0), randn(10, 4, seed=1), randn(10, 3, seed=2), 0.3
    w = start.clone()
    dgd_update(w, slopes.T @ x / 10, x.T @ x / 10, lr=lr, target=target)
    w.requires_grad_()
    said = x @ start.T if target == "residual" else torch.zeros(10, 3, dtype=torch.float64)
    targets = said - slopes
    fit = sum(0.5 * (w @ x_t - to).square().sum() for x_t, to in zip(x, targets, strict=True)) / 10
    (fit + (w - start).square().sum() / (2 * lr)).backward()
    torch.testing.assert_close(w.grad, torch.zeros_like(w), rtol=0, atol=1e-12)


def test_a_gradient_of_zero_keeps_the_weights_of_the_residual_target_alone():
    w, x = randn(3, 4, seed=0), randn(10, 4, seed=1)
    kept, decayed = w.clone(), w.clone()
    dgd_update(kept, torch.zeros_like(w), x.T @ x, lr=0.3, target="residual")
    dgd_update(decayed, torch.zeros_like(w), x.T @ x, lr=0.3)
    assert torch.equal(kept, w) and decayed.norm() < 0.5 * w.norm()


def test_batches_of_matrices_and_low_precision():
    w, g, x = randn(2, 3, 4, seed=0), randn(2, 3, 4, seed=1), randn(2, 9, 4, seed=2)
    batched, low = w.clone(), w.bfloat16()
    dgd_update(batched, g, x.mT @ x, lr=0.1, weight_decay=0.5)
    dgd_update(low, g.bfloat16(), x.mT @ x, lr=0.1, weight_decay=0.5)
    for i in range(2):
        alone = w[i].clone()
        dgd_update(alone, g[i], x[i].T @ x[i], lr=0.1, weight_decay=0.5)
        torch.testing.assert_close(batched[i], alone)
    torch.testing.assert_close(low.double(), batched, rtol=0.02, atol=0.02)


def test_a_layer_is_trained_with_the_inputs_of_all_its_passes():
    layer = nn.Linear(4, 3, bias=False)
    accumulate_gram(layer, 20)
    rule = DGD([layer.weight], 0.2, weight_decay=0.1)
    expected = layer.weight.detach().clone().double()
    for step in range(3):
        inputs = [randn(2, 5, 4, seed=10 * step + micro, dtype=torch.float32) for micro in range(2)]
        for x in inputs:
            (layer(x).square().mean() / 2).backward()
        flat = torch.cat(inputs).flatten(0, 1).double()
        g, s = layer.weight.grad.double(), sum(torch.outer(x, x) for x in flat) / len(flat)
        expected = (expected * (1 - 0.2 * 0.1) - 0.2 * g) @ torch.linalg.inv(torch.eye(4).double() + 0.2 * s)
        rule.step()
        torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
        rule.zero_grad()
        assert layer.weight.gram is None
    assert not rule.state[layer.weight]


def test_a_weight_without_its_gram_matrix_is_refused():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.ones(3, 4)
    rule = DGD([weight])
    with pytest.raises(ValueError, match="has none"):
        rule.step()
    weight.gram = torch.eye(5)
    with pytest.raises(ValueError, match=r"one of shape \(5, 5\)"):
        rule.step()
