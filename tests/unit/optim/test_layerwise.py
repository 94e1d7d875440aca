"""Matrices side by side in stacks: what shares memory, what stays in place, and that nothing else changes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from hopescale.config.schema import GroupConfig, OptimConfig, ScheduleConfig
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.layerwise import LayerwiseOptimizer
from hopescale.optim.rules import make_rule
from hopescale.parallel.layers import ParameterSpec, attach

SHAPES = {"a.0": (4, 6), "b": (6, 4), "a.1": (4, 6), "slow": (4, 6), "heads": (3, 4, 6), "a.2": (4, 6)}
GROUPS = {"b": GroupConfig(rule="m3", match=("b",), weight_decay=0.5), "rest": GroupConfig(rule="m3")}
CONFIG = OptimConfig(lr=0.1, groups=GROUPS, grad_clip=None, schedule=ScheduleConfig(min_lr_ratio=1.0))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    values = {name: randn(*shape, seed=index).to(dtype) for index, (name, shape) in enumerate(SHAPES.items())}
    return {name: attach(nn.Parameter(value), ParameterSpec()) for name, value in values.items()}


def make_updater(dtype: torch.dtype) -> tuple[OuterOptimizer, LayerwiseOptimizer]:
    optimizer = OuterOptimizer(make_parameters(dtype), CONFIG, 10, {"slow": Cadence(2)})
    return optimizer, optimizer.updaters[0]


def take_step(optimizer: OuterOptimizer, step: int) -> None:
    for index, parameter in enumerate(optimizer.parameters.values()):
        parameter.backward(randn(*parameter.shape, seed=100 * step + index).to(parameter.dtype))
    optimizer.step(step, torch.tensor(0.0))


@dtypes
def test_what_is_alike_and_due_together_is_one_class(dtype: torch.dtype):
    _, updater = make_updater(dtype)
    assert [each.names for each in updater.classes] == [["a.0", "a.1", "a.2"], ["b"], ["slow"], ["heads"]]
    for each in updater.classes:
        for stack, parts in (
            (each.weights, [updater.parameters[name] for name in each.names]),
            (each.gradients, [updater.accumulated_grad(name) for name in each.names]),
            (each.master, updater.masters(each.names)),
        ):
            assert parts[0].data_ptr() == stack.data_ptr()
            assert all(b.data_ptr() - a.data_ptr() == a.nbytes for a, b in pairwise(parts))
        assert (each.master.data_ptr() == each.weights.data_ptr()) == (dtype == torch.float32)


@dtypes
def test_every_tensor_of_state_and_weights_stays_where_it_is(dtype: torch.dtype):
    """Loading copies into the tensors of a fresh optimizer."""
    optimizer, updater = make_updater(dtype)

    def places() -> dict[str, int]:
        tensors = optimizer.weights() | optimizer.state_dict() | {f"sum {n}": t for n, t in optimizer.sums().items()}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = places()
    for step in range(1, 4):
        take_step(optimizer, step)
    assert places() == before and updater.sums().keys() == {"slow"}
    assert optimizer.state_dict()["a.1.step"] == 3 and optimizer.state_dict()["slow.step"] == 1


def test_classes_equal_the_rule_over_separate_matrices():
    optimizer, _ = make_updater(torch.float32)
    separate = {name: nn.Parameter(p.detach().clone()) for name, p in optimizer.parameters.items()}
    decays = {name: 0.5 if name == "b" else CONFIG.weight_decay for name in separate}
    rules = {
        name: make_rule("m3", [{"params": [p], "weight_decay": decays[name], "lr": CONFIG.lr}], CONFIG)
        for name, p in separate.items()
    }
    waiting = torch.zeros(SHAPES["slow"])
    for step in range(1, 7):
        take_step(optimizer, step)
        for index, (name, p) in enumerate(separate.items()):
            p.grad = randn(*p.shape, seed=100 * step + index)
            if name == "slow":
                waiting += p.grad
                if step % 2:
                    continue
                p.grad = waiting.clone()
                waiting.zero_()
            rules[name].step()
        for name, p in separate.items():
            torch.testing.assert_close(optimizer.parameters[name], p, rtol=1e-5, atol=1e-5)


@dtypes
def test_a_state_restored_in_mid_period_continues_bit_for_bit(dtype: torch.dtype):
    whole, first, second = (make_updater(dtype)[0] for _ in range(3))
    for step in range(1, 4):
        take_step(whole, step)
        take_step(first, step)
    with torch.no_grad():
        for kind in ("weights", "state_dict", "sums"):
            into = getattr(second, kind)()
            for name, tensor in getattr(first, kind)().items():
                into[name].copy_(tensor)
    second.load(second.weights(), second.state_dict())
    for step in range(4, 8):
        take_step(whole, step)
        take_step(second, step)
    ended, expected = second.state_dict() | second.weights(), whole.state_dict() | whole.weights()
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


@dtypes
def test_masters_begin_anew_from_the_weights(dtype: torch.dtype):
    optimizer, updater = make_updater(dtype)
    take_step(optimizer, 1)
    weights = {name: torch.ones_like(weight) for name, weight in optimizer.weights().items()}
    optimizer.load(weights)
    assert all((master == 1).all() for master in updater.masters(list(SHAPES)))
