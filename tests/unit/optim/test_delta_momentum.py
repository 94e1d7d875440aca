"""Delta Momentum against its equation entry by entry, and on the function of the paper's Figure 4."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.delta_momentum import DeltaMomentum
from tools.plot_eq53 import follow


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("beta2", [None, 0.8])
@pytest.mark.parametrize("form", ["unit", "paper"])
@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (1, 3), (3, 1)])
def test_it_is_the_equation(shape: tuple[int, int], form: str, beta2: float | None):
    rows, columns = shape
    lr, alpha, delta, decay, eps = 0.1, 0.9, 0.3, 0.2, 1e-3
    weight = nn.Parameter(randn(*shape, seed=0))
    rule = DeltaMomentum([weight], lr, momentum=alpha, weight_decay=decay, delta=delta, form=form, beta2=beta2, eps=eps)
    w, m, v = weight.tolist(), [[0.0] * columns for _ in range(rows)], [[0.0] * columns for _ in range(rows)]
    for step in range(1, 6):
        weight.grad = 0.5 * randn(*shape, seed=step)
        g = weight.grad.tolist()
        square = sum(x * x for row in g for x in row) if form == "unit" else 1.0
        new = [[0.0] * columns for _ in range(rows)]
        for i in range(rows):
            for j in range(columns):
                erased = sum(m[i][k] * sum(g[r][k] * g[r][j] for r in range(rows)) for k in range(columns)) / square
                value = g[i][j]
                if beta2 is not None:
                    v[i][j] = beta2 * v[i][j] + (1 - beta2) * g[i][j] ** 2
                    value /= (v[i][j] / (1 - beta2**step)) ** 0.5 + eps
                new[i][j] = alpha * m[i][j] - delta * erased - lr * value
        m = new
        w = [[(1 - lr * decay) * w[i][j] + m[i][j] for j in range(columns)] for i in range(rows)]
        rule.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(w, dtype=torch.float64), rtol=1e-11, atol=1e-12)


def test_without_an_erase_it_is_torch_momentum():
    ours, theirs = (nn.Parameter(randn(3, 4, seed=0)) for _ in "ab")
    rules = DeltaMomentum([ours], 0.1, momentum=0.9, delta=0.0), torch.optim.SGD([theirs], 0.1, momentum=0.9)
    for step in range(10):
        for weight, rule in zip((ours, theirs), rules, strict=True):
            weight.grad = randn(3, 4, seed=step + 1)
            rule.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_unit_erase_forgets_along_the_gradient_alone():
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    rule = DeltaMomentum([weight], lr=0.0, momentum=1.0, delta=1.0)
    for scale in (1e-6, 1e6):
        rule.state[weight]["momentum_buffer"].fill_(1.0)
        weight.grad = torch.tensor([[scale, 0.0]], dtype=torch.float64)
        rule.step()
        torch.testing.assert_close(rule.state[weight]["momentum_buffer"], torch.tensor([[0.0, 1.0]]).double())


def test_the_printed_form_is_unstable_for_large_gradients():
    weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    rule = DeltaMomentum([weight], 1e-3, delta=1.0, form="paper")
    for _ in range(40):
        weight.grad = torch.full_like(weight, 2.0)
        rule.step()
    assert weight.abs().max() > 1e6


def steps_to_settle(lr: float, momentum: float, delta: float, limit: int = 600) -> Tensor:
    """Count steps on Eq. 53 until a point stays within 0.01 of the optimum (0, 0); `limit` if it never does.

    Returns:
        Of each start, `[64]`.
    """
    ways = follow(partial(DeltaMomentum, lr=lr, momentum=momentum, delta=delta), limit)
    outside = ~(ways[..., :2].square().sum(-1) < 1e-4)
    return (outside * torch.arange(limit + 1)[:, None]).amax(0).double()


def test_it_beats_plain_momentum_on_the_toy_function_of_figure_4():
    """Where momentum overshoots, and with the best of the grid for each; at small rates the erase only slows it."""
    grid = [(lr, momentum) for lr in (5e-3, 1e-2, 1.5e-2) for momentum in (0.9, 0.95)]
    plain, delta = ({at: steps_to_settle(*at, delta) for at in grid} for delta in (0.0, 0.1))
    for at in ((1e-2, 0.95), (1.5e-2, 0.9), (1.5e-2, 0.95)):
        assert delta[at].mean() < 0.8 * plain[at].mean()
        assert (delta[at] == 600).sum() < 0.5 * (plain[at] == 600).sum()
    assert min(steps.mean() for steps in delta.values()) < 0.8 * min(steps.mean() for steps in plain.values())
    assert delta[5e-3, 0.9].mean() > plain[5e-3, 0.9].mean()


def test_there_is_no_other_form():
    with pytest.raises(ValueError, match="printed"):
        DeltaMomentum([nn.Parameter(torch.zeros(2, 2))], form="printed")
