"""Deep momentum against its equation with gradients by autograd, one row at a time, and its linear special case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.deep_momentum import DeepMomentum


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answer(memory: dict[str, Tensor], u: Tensor) -> Tensor:
    if "memory" in memory:
        return memory["memory"] @ u
    return u + memory["memory_w1"] @ torch.tanh(memory["memory_w2"] @ u)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_it_is_the_equation(kind: str, objective: str):
    lr, decay, alpha, inner_lr = 0.1, 0.3, 0.8, 0.2
    weight = nn.Parameter(randn(4, 3, seed=0))
    rule = DeepMomentum(
        [weight],
        lr,
        weight_decay=decay,
        alpha=alpha,
        inner_lr=inner_lr,
        objective=objective,
        memory=kind,
        memory_dim=5 if kind == "mlp" else None,
    )
    for tensor in rule.state[weight].values():
        tensor.copy_(0.5 * randn(*tensor.shape, seed=9))  # so that nothing is zero by chance
    w, memory = weight.detach().clone(), {name: t.clone() for name, t in rule.state[weight].items()}
    for step in range(4):
        g = randn(4, 3, seed=step + 1)
        if step == 2:
            g[1] = 0
        leaves = {name: tensor.requires_grad_() for name, tensor in memory.items()}
        units = [row / row.norm() if row.any() else row for row in g]
        losses = [
            -(answer(leaves, u) @ u) if objective == "dot" else 0.5 * (answer(leaves, u) - u).square().sum()
            for u in units
        ]
        slopes = torch.autograd.grad(sum(losses), [*leaves.values()])
        with torch.no_grad():
            memory = {
                name: alpha * tensor - inner_lr * slope
                for (name, tensor), slope in zip(memory.items(), slopes, strict=True)
            }
            update = torch.stack([row.norm() * answer(memory, u) for row, u in zip(g, units, strict=True)])
            w = (1 - lr * decay) * w - lr * update
        weight.grad = g
        rule.step()
        torch.testing.assert_close(weight.detach(), w, rtol=1e-10, atol=1e-12)
        for name, tensor in memory.items():
            torch.testing.assert_close(rule.state[weight][name], tensor, rtol=1e-10, atol=1e-12)


def test_a_linear_memory_gathers_outer_products_of_rows():
    weight, held = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)), torch.zeros(3, 3, dtype=torch.float64)
    rule, expected = DeepMomentum([weight], 0.1, alpha=0.9, inner_lr=0.5, memory="linear"), weight.detach().clone()
    for step in range(5):
        g = randn(4, 3, seed=step)
        units = g / g.norm(dim=1, keepdim=True)
        held = 0.9 * held + 0.5 * sum(torch.outer(u, u) for u in units)
        expected -= 0.1 * g.norm(dim=1, keepdim=True) * (units @ held.T)
        weight.grad = g
        rule.step()
        torch.testing.assert_close(rule.state[weight]["memory"], held)
        torch.testing.assert_close(weight.detach(), expected)


def test_the_opposite_gradient_gives_the_opposite_update():
    moved = []
    for sign in (1, -1):
        weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        rule = DeepMomentum([weight], 0.1, inner_lr=0.3)
        for step in range(3):
            weight.grad = sign * randn(4, 3, seed=step)
            rule.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[0], -moved[1])
    assert moved[0].abs().min() > 0


def test_every_head_has_a_memory():
    heads = nn.Parameter(torch.zeros(2, 4, 3))
    assert {name: t.shape for name, t in DeepMomentum([heads], memory_dim=5).state[heads].items()} == {
        "memory_w1": (2, 3, 5),
        "memory_w2": (2, 5, 3),
    }
    state = DeepMomentum([heads], memory="linear").state[heads]
    assert {name: t.shape for name, t in state.items()} == {"memory": (2, 3, 3)}


def test_a_given_root_mean_square():
    weight = nn.Parameter(torch.zeros(2, 6, 4))
    weight.grad = randn(2, 6, 4, seed=0).float() * torch.tensor([1e-3, 1e3]).view(2, 1, 1)
    DeepMomentum([weight], 1.0, update_rms=0.2).step()
    torch.testing.assert_close(weight.detach().square().mean(dim=(1, 2)).sqrt(), torch.full((2,), 0.2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "cosine"}, "cosine"),
        ({"memory": "deep"}, "deep"),
        ({"memory": "linear", "memory_dim": 8}, "no hidden width"),
        ({"memory_dim": 0}, "memory_dim is 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DeepMomentum([nn.Parameter(torch.zeros(2, 2))], **settings)
