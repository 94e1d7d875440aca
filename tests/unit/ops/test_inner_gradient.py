"""What MLP memories write against automatic differentiation of their inner loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hopescale.ops.self_modifying.inner_gradient import mlp_writes
from hopescale.ops.self_modifying.types import MemorySpec

BATCH, HEADS, MEMORIES, TOKENS, DIM, HIDDEN = 2, 2, 3, 5, 4, 6
SETTINGS = [
    *itertools.product(("l2", "dot"), (True, False), (None, 0.7), (True, False), (False,)),
    ("l2", True, None, False, True),
    ("l2", True, 0.7, True, True),
    ("dot", False, None, True, True),
]


def make_inputs(wide: bool, own_target: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    lead = (BATCH, HEADS)
    return {
        "pre": rand(*lead, TOKENS * (1 + own_target), MEMORIES * HIDDEN),
        "w1": rand(*lead, MEMORIES, HIDDEN, DIM if wide else 1),
        "k": rand(*lead, TOKENS, DIM),
        "v": rand(*lead, TOKENS, DIM),
        "fresh": rand(*lead, TOKENS),
    }


def make_spec(objective: str, own_target: bool, cap: float | None, normalized: bool = False) -> MemorySpec:
    how = {"normalize_writes": normalized}
    return MemorySpec(("mem",), (), HIDDEN, TOKENS, objective, own_target, True, cap, 1e-2, 1.0, "prefix", **how)


def written(inputs: dict[str, Tensor], spec: MemorySpec, *, wide: bool, with_fresh: bool) -> tuple[Tensor, ...]:
    residual = (inputs["k"], inputs["v"]) if wide else None
    fresh = inputs["fresh"] if with_fresh else None
    return mlp_writes(inputs["pre"], inputs["w1"], residual=residual, fresh=fresh, spec=spec)


@pytest.mark.parametrize(("objective", "own_target", "cap", "with_fresh", "normalized"), SETTINGS)
@pytest.mark.parametrize("wide", [True, False])
def test_writes_are_minus_the_gradient_of_the_inner_loss(
    objective: str, own_target: bool, cap: float | None, with_fresh: bool, normalized: bool, wide: bool
):
    if not wide and not own_target:
        pytest.skip("gate memories make their own targets")
    inputs = make_inputs(wide, own_target)
    spec = make_spec(objective, own_target, cap, normalized)
    first, keys, values, surprise = written(inputs, spec, wide=wide, with_fresh=with_fresh)
    amplified: list[bool] = []
    for b, h, n, t in itertools.product(range(BATCH), range(HEADS), range(MEMORIES), range(TOKENS)):
        rows = inputs["pre"][b, h].detach().unflatten(-1, (MEMORIES, HIDDEN))[:, n]
        w1 = inputs["w1"][b, h, n].detach().requires_grad_()
        a = rows[t].clone().requires_grad_()
        answer = torch.nn.functional.silu(a) @ w1 + (inputs["k"][b, h, t].detach() if wide else 0)
        target = inputs["v"][b, h, t].detach() if wide else torch.zeros(1, dtype=torch.float64)
        if own_target:
            target = target + torch.nn.functional.silu(rows[TOKENS + t]) @ w1.detach()
        error = answer - target if objective == "l2" else -target
        error = error.detach()
        error = error * (1.0 if cap is None else min(1.0, cap / float(error @ error + 1e-12) ** 0.5))
        torch.testing.assert_close(surprise[b, h, n, t], error.norm())
        error = error * (inputs["fresh"][b, h, t].detach() if with_fresh else 1.0)
        d_a, d_w1 = torch.autograd.grad(answer, [a, w1], grad_outputs=error)
        if normalized:
            square, length = torch.nn.functional.silu(a.detach()).square().sum() + 1e-2, error.square().sum()
            amplified += [float(d_a.square().sum() / length) > 1, float(square) > 1]
            d_a, d_w1 = d_a / (d_a.square().sum() / length).clamp_min(1), d_w1 / square.clamp_min(1)
        torch.testing.assert_close(first[b, h, t].unflatten(-1, (MEMORIES, HIDDEN))[n], -d_a)
        torch.testing.assert_close(torch.outer(keys[b, h, n, t], values[b, h, n, t]), -d_w1)
        hidden = torch.nn.functional.silu(a.detach())
        torch.testing.assert_close(keys[b, h, n, t], hidden / torch.sqrt(hidden @ hidden + 1e-2))
    assert not normalized or (any(amplified) and not all(amplified))


@pytest.mark.parametrize(("objective", "own_target", "cap", "with_fresh", "normalized"), SETTINGS)
@pytest.mark.parametrize("wide", [True, False])
def test_gradients_are_those_of_the_equations(
    objective: str, own_target: bool, cap: float | None, with_fresh: bool, normalized: bool, wide: bool
):
    if not wide and not own_target:
        pytest.skip("gate memories make their own targets")
    inputs = make_inputs(wide, own_target)
    spec = make_spec(objective, own_target, cap, normalized)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return written(dict(zip(inputs, tensors, strict=True)), spec, wide=wide, with_fresh=with_fresh)[:3]

    assert torch.autograd.gradcheck(function, list(inputs.values()), fast_mode=True)


def test_values_that_are_targets_must_be_given():
    inputs = make_inputs(False, False)
    with pytest.raises(ValueError, match="residual is None"):
        written(inputs, make_spec("l2", False, None), wide=False, with_fresh=False)
