"""The loop that computes its parts again against the same loop under plain differentiation."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor

from hopescale.ops.self_modifying.scan import Replay, scan


def step(index: int, carry: dict, parts: list[Tensor]) -> tuple[list[Tensor], dict, dict]:
    state, (untouched, _) = carry["state"], carry["rest"]
    x, fixed = parts
    y = x * torch.tanh(state[:, :, None]) + (index + 1) * fixed.square()
    return [y, (2 * y).detach()], {"state": state + y.sum(2), "rest": (untouched, None)}, {"added": (y.sum(2), None)}


def follow(carry: dict, trace: dict) -> dict:
    return carry | {"state": carry["state"] + trace["added"][0]}


def run(sizes: list[int], recompute: bool, replay: Replay | None = None, *, only_state: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = sum(sizes)
    x = torch.randn(2, 3, tokens, 4, generator=g, dtype=torch.float64, requires_grad=True)
    fixed = torch.randn(2, 3, tokens, 4, generator=g, dtype=torch.float64)
    state = torch.randn(2, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    untouched = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    options = {"recompute": recompute, "replay": replay}
    (y, double), carry = scan(step, sizes, [x, fixed], {"state": state, "rest": (untouched, None)}, **options)
    last, (same, _) = carry["state"], carry["rest"]
    loss = last.square().sum() if only_state else y.pow(3).sum() + last.sin().sum() + same.square().sum()
    gradients = torch.autograd.grad(loss, [x, state, untouched], allow_unused=True, materialize_grads=True)
    return [y, double, last, *gradients]


@pytest.mark.parametrize("only_state", [False, True])
@pytest.mark.parametrize("sizes", [[1], [3, 3, 2], [1, 1, 1, 1]])
def test_recomputed_parts_give_the_same_results_and_gradients(sizes: list[int], only_state: bool):
    expected, actual = (run(sizes, recompute, only_state=only_state) for recompute in (False, True))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_but_what_is_carried_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        x = torch.randn(2, 3, 100, 4, requires_grad=True)
        first = {"state": torch.zeros(2, 3, 4), "rest": (torch.zeros(5), None)}
        scan(step, [10] * 10, [x, x.detach()], first, recompute=True)
    assert len(kept) == 2 + 10 * 2
    assert sum(shape.numel() for shape in kept) == 2 * x.numel() + 10 * (24 + 5)


@pytest.mark.parametrize("parts", range(1, 10))
def test_what_is_carried_is_found_again(parts: int):
    sizes = [2, 1, 3, 1, 1, 2, 1, 1]
    for a, b in zip(run(sizes, True, Replay(follow, parts)), run(sizes, True), strict=True):
        assert torch.equal(a, b)


def test_traces_are_kept_instead_and_nothing_around_them():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x = torch.randn(2, 3, 100, 4, requires_grad=True)
        first = {"state": torch.zeros(2, 3, 4), "rest": (torch.zeros(5), None)}

        def with_view(*args) -> tuple:
            outputs, carry, _ = step(*args)
            return outputs, carry, {"added": (torch.zeros(9, 2, 3, 4)[4], None)}

        scan(with_view, [10] * 10, [x, x.detach()], first, recompute=True, replay=Replay(follow, 4))
    sizes = [tensor.untyped_storage().nbytes() // 4 for tensor in kept if tensor is not None]
    assert sizes == [2400, 2400] + [24, 5, 24, 24, 24] * 2 + [24, 5, 24]


def test_at_most_one_state_for_each_half_is_there_at_a_time():
    alive: set[int] = set()
    most = 0

    def counted(carry: dict, trace: dict) -> dict:
        nonlocal most
        carry = follow(carry, trace)
        state = carry["state"]
        alive.add(id(state))
        weakref.finalize(state, alive.discard, id(state))
        most = max(most, len(alive))
        return carry

    run([1] * 32, True, Replay(counted, 32))
    assert most <= 1 + math.log2(32)
