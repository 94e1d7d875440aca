"""The outer optimizer against torch's AdamW, and the cadence against sums of gradients made by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from hopescale.common.errors import ConfigError
from hopescale.config.schema import GroupConfig, OptimConfig, ScheduleConfig
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.schedule import learning_rate
from hopescale.parallel.layers import ParameterSpec, attach
from tests.support.many_ranks import Group, mesh_of

TOTAL = 20
SHAPES = {"a.weight": (3, 4), "b.weight": (5,), "norm.weight": (4,)}
GROUPS = {"no_decay": GroupConfig(match=("norm*",), weight_decay=0.0), "decay": GroupConfig()}


def make_config(**settings) -> OptimConfig:
    """With an `eps` so large that the scale of a gradient matters."""
    schedule = ScheduleConfig(warmup_steps=3)
    defaults = {"lr": 0.05, "eps": 0.1, "weight_decay": 0.1, "groups": GROUPS, "schedule": schedule}
    return OptimConfig(**defaults | settings)


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {name: attach(nn.Parameter(value), ParameterSpec()) for name, value in values.items()}


def make_optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig, **cadences: Cadence) -> OuterOptimizer:
    named = {f"{name}.weight": cadence for name, cadence in cadences.items()}
    return OuterOptimizer(parameters, config, TOTAL, named)


def gradient(name: str, step: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def feed(optimizer: OuterOptimizer, gradients: dict[str, Tensor]) -> None:
    """Let a backward pass end with these gradients."""
    for name, value in gradients.items():
        parameter = optimizer.parameters[name]
        parameter.backward(value.to(parameter.dtype))


def norm_of(optimizer: OuterOptimizer, names: list[str]) -> Tensor:
    return optimizer.grad_norms({"": names})[""]


def take_step(optimizer: OuterOptimizer, step: int, *, scale: float = 1.0) -> Tensor:
    feed(optimizer, {name: scale * gradient(name, step) for name in optimizer.parameters})
    norm = norm_of(optimizer, optimizer.due(step))
    optimizer.step(step, norm)
    return norm


def torch_adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [parameters["norm.weight"]], "weight_decay": 0.0},
        {"params": [parameters["a.weight"], parameters["b.weight"]], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_rate(rule: torch.optim.Optimizer, step: int, config: OptimConfig) -> None:
    for group in rule.param_groups:
        group["lr"] = learning_rate(step, config.lr, TOTAL, config.schedule)


def values(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in right:
        torch.testing.assert_close(
            left[name], right[name], rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
def test_with_period_one_it_is_torch_adamw(clip: float | None):
    config = make_config(grad_clip=clip)
    ours, theirs = make_parameters(), make_parameters()
    optimizer, rule = make_optimizer(ours, config), torch_adamw(theirs, config)
    for step in range(1, TOTAL + 1):
        norm = take_step(optimizer, step)
        for name, parameter in theirs.items():
            parameter.grad = gradient(name, step)
        expected = nn.utils.clip_grad_norm_(theirs.values(), clip or math.inf)
        set_rate(rule, step, config)
        rule.step()
        torch.testing.assert_close(norm, expected)
        assert_close(values(ours), values(theirs))


def test_micro_batches_add_up_to_one_gradient():
    config = make_config()
    whole, parts = make_parameters(), make_parameters()
    one, many = make_optimizer(whole, config), make_optimizer(parts, config)
    feed(one, {name: sum(gradient(name, 1, micro) for micro in range(3)) for name in whole})
    for micro in range(3):
        feed(many, {name: gradient(name, 1, micro) for name in parts})
    for optimizer in (one, many):
        optimizer.step(1, norm_of(optimizer, optimizer.due(1)))
    assert_close(values(whole), values(parts))


@pytest.mark.parametrize(("period", "phase"), [(2, 0), (4, 0), (4, 1), (4, 3)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_slow_level_takes_one_step_per_period_with_the_sum(period: int, phase: int, clip: float | None):
    """`a` is slow. Each parameter is followed by an AdamW of its own that is handed the summed, clipped gradient."""
    config = make_config(grad_clip=clip)
    ours, theirs = make_parameters(), make_parameters()
    cadence = Cadence(period, phase)
    optimizer, rule = make_optimizer(ours, config, a=cadence), torch_adamw(theirs, config)
    waiting = torch.zeros(SHAPES["a.weight"])
    for step in range(1, 13):
        before = ours["a.weight"].detach().clone()
        norm = take_step(optimizer, step)
        waiting += gradient("a.weight", step)
        due = {name: gradient(name, step) for name in ("b.weight", "norm.weight")}
        if cadence.is_due(step):
            due["a.weight"] = waiting.clone()
            waiting.zero_()
        else:
            assert torch.equal(ours["a.weight"], before)
        means = [g / period if name == "a.weight" else g for name, g in due.items()]
        expected = torch.cat([mean.flatten() for mean in means]).norm()
        torch.testing.assert_close(norm, expected)
        scale = 1.0 if clip is None else min(1.0, clip / (expected.item() + 1e-6))
        for name, parameter in theirs.items():
            parameter.grad = due[name] * scale if name in due else None
        set_rate(rule, step, config)
        rule.step()
        assert_close(values(ours), values(theirs))
    assert optimizer.updaters[0].rule.state[ours["a.weight"]]["step"] == cadence.updates(12)


def test_a_constant_gradient_has_the_same_norm_at_every_period():
    config = make_config(grad_clip=0.1, weight_decay=0.0)
    norms = []
    for period in (1, 4):
        parameters = make_parameters()
        optimizer = make_optimizer(parameters, config, a=Cadence(period))
        for step in range(1, 5):
            feed(optimizer, {name: gradient(name, 1) for name in parameters})
            norm = norm_of(optimizer, ["a.weight"])
            optimizer.step(step, norm_of(optimizer, optimizer.due(step)))
        norms.append(norm)
    torch.testing.assert_close(norms[0], norms[1])


def test_due_names_follow_period_and_phase():
    optimizer = make_optimizer(make_parameters(), make_config(), a=Cadence(4, 1), b=Cadence(2))
    assert [optimizer.due(step) for step in range(1, 5)] == [
        ["norm.weight"],
        ["b.weight", "norm.weight"],
        ["a.weight", "norm.weight"],
        ["b.weight", "norm.weight"],
    ]


def test_nothing_due_is_a_step_that_changes_nothing():
    parameters = make_parameters()
    every_second = dict.fromkeys(SHAPES, Cadence(2))
    optimizer = OuterOptimizer(parameters, make_config(), TOTAL, every_second)
    before = values(parameters)
    assert take_step(optimizer, 1) == 0
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_a_parameter_without_gradient_only_decays():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, make_config(schedule=ScheduleConfig(min_lr_ratio=1.0)))
    before = values(parameters)
    optimizer.step(1, norm_of(optimizer, optimizer.due(1)))
    torch.testing.assert_close(parameters["a.weight"].detach(), before["a.weight"] * (1 - 0.05 * 0.1))
    assert torch.equal(parameters["norm.weight"], before["norm.weight"])


def test_groups_have_their_own_decay_rate_and_moments():
    groups = {
        "still": GroupConfig(match=("norm*",), weight_decay=0.0, lr_scale=0.0),
        "own": GroupConfig(match=("a*",), weight_decay=0.5, lr_scale=2.0, betas=(0.0, 0.0)),
        "rest": GroupConfig(),
    }
    config = make_config(groups=groups, schedule=ScheduleConfig(min_lr_ratio=1.0), grad_clip=None, eps=1e-8)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, config)
    assert optimizer.rates(7) == pytest.approx({"still": 0.0, "own": 0.1, "rest": 0.05})
    before = values(parameters)
    take_step(optimizer, 1)
    take_step(optimizer, 2)
    assert torch.equal(parameters["norm.weight"], before["norm.weight"])
    # Without moments AdamW moves by the sign of the gradient, after the decay.
    expected = before["a.weight"]
    for step in (1, 2):
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * gradient("a.weight", step).sign()
    torch.testing.assert_close(parameters["a.weight"].detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_parameter_of_two_groups_is_refused():
    with pytest.raises(ConfigError, match="optim.groups"):
        make_optimizer(make_parameters(), make_config(groups=GROUPS | {"twice": GroupConfig(match=("norm*",))}))


def test_low_precision_weights_follow_float32_masters():
    """Updates too small for bfloat16 must add up. Gradients are exact in both precisions."""
    config = make_config(lr=2e-3, weight_decay=0.0, schedule=ScheduleConfig(min_lr_ratio=1.0))
    low = make_parameters(torch.bfloat16)
    start = values(low)
    high = {name: attach(nn.Parameter(p.detach().float()), ParameterSpec()) for name, p in low.items()}
    optimizer, reference = make_optimizer(low, config, a=Cadence(2)), make_optimizer(high, config, a=Cadence(2))
    for step in range(1, TOTAL + 1):
        for o in (optimizer, reference):
            feed(o, {name: gradient(name, step).bfloat16() for name in o.parameters})
            o.step(step, norm_of(o, o.due(step)))
    for name, parameter in low.items():
        assert parameter.dtype == torch.bfloat16
        (master,) = optimizer.masters([name])
        assert torch.equal(master, high[name])
        assert torch.equal(parameter, high[name].bfloat16())
        assert not torch.equal(master, parameter.float())
        assert not torch.equal(parameter, start[name])


def test_float32_weights_are_their_own_masters():
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, make_config())
    masters = optimizer.updaters[0].masters(list(parameters))
    assert all(m.data_ptr() == p.data_ptr() for m, p in zip(masters, parameters.values(), strict=True))
    assert not any(name.endswith(".master") for name in optimizer.state_dict())


def test_a_change_is_measured_in_the_copies_that_were_taken_before():
    parameters = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(parameters, make_config())
    names, before = list(parameters), optimizer.masters(list(parameters))
    kept = [copy.clone() for copy in before]
    feed(optimizer, {name: gradient(name, 1).bfloat16() for name in names})
    optimizer.step(1, norm_of(optimizer, names))
    differences = [old - new for old, new in zip(kept, optimizer.masters(names), strict=True)]
    found = optimizer.change({"all": names}, {"all": before}).read()["all"]
    assert found == pytest.approx(torch.cat([each.flatten() for each in differences]).square().mean().sqrt().item())
    assert found > 0 and all(map(torch.equal, before, differences))  # no third set of weights was made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_restored_in_mid_period_continues_bit_for_bit(dtype: torch.dtype):
    config, cadences = make_config(), {"a": Cadence(4), "b": Cadence(2, 1)}

    def start(seed: int) -> OuterOptimizer:
        return make_optimizer(make_parameters(dtype, seed), config, **cadences)

    whole, first, second = start(0), start(0), start(1)
    for step in range(1, 11):
        take_step(whole, step)
    for step in range(1, 6):
        take_step(first, step)
    saved = {name: tensor.clone() for name, tensor in (first.state_dict() | first.sums()).items()}
    assert saved["a.weight"].abs().sum() > 0
    weights = values(first.parameters)
    with torch.no_grad():
        for name, tensor in (second.state_dict() | second.sums()).items():
            tensor.copy_(saved[name])
        for name, parameter in second.parameters.items():
            parameter.copy_(weights[name])
    for step in range(6, 11):
        take_step(second, step)
    ended, expected = second.state_dict() | second.sums(), whole.state_dict() | whole.sums()
    assert ended.keys() == expected.keys()
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    assert all(torch.equal(second.parameters[name], whole.parameters[name]) for name in SHAPES)


def test_the_state_has_the_same_tensors_before_and_after_the_first_step():
    """Loading copies into the tensors of a fresh optimizer."""
    optimizer = make_optimizer(make_parameters(torch.bfloat16), make_config(), a=Cadence(2))
    before = optimizer.state_dict() | optimizer.sums()
    take_step(optimizer, 1)
    after = optimizer.state_dict() | optimizer.sums()
    assert {name: tensor.data_ptr() for name, tensor in before.items()} == {n: t.data_ptr() for n, t in after.items()}
    keys = {"master", "step", "exp_avg", "exp_avg_sq"}
    expected = {f"{name}.{key}" for name in SHAPES for key in keys} | {"a.weight"}
    assert after.keys() == expected


@pytest.mark.parametrize("period", [1, 4])
def test_a_mean_is_the_sum_over_the_period(period: int):
    """Without a clip, an update with the mean is one with the sum of gradients that are smaller by the period."""
    results = []
    for accumulate, scale in (("mean", 1.0), ("sum", 1.0 / period)):
        parameters = make_parameters()
        config = make_config(accumulate=accumulate, grad_clip=None)
        optimizer = make_optimizer(parameters, config, a=Cadence(period))
        for step in range(1, 5):
            gradients = {name: gradient(name, step) for name in parameters}
            feed(optimizer, gradients | {"a.weight": gradients["a.weight"] * scale})
            optimizer.step(step, norm_of(optimizer, optimizer.due(step)))
        results.append(values(parameters))
    assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_write_each_copy_once_and_about_as_much(dtype: torch.dtype):
    sizes = [7, 1, 40, 40, 12, 9, 33, 2]
    written: Counter[str] = Counter()
    entries = []
    for rank in range(3):
        parameters = {
            f"a.{index}": attach(nn.Parameter(torch.ones(size, dtype=dtype)), ParameterSpec())
            for index, size in enumerate(sizes)
        }
        mesh = mesh_of(Group(3, rank))
        optimizer = OuterOptimizer(parameters, make_config(groups={"all": GroupConfig()}), 10, {}, mesh=mesh)
        weights, state = optimizer.to_save()
        assert {name.rpartition(".")[0] for name in state} == weights.keys()
        written.update([*weights, *state])
        entries.append(sum(weight.numel() for weight in weights.values()))
    assert written == Counter([*optimizer.weights(), *optimizer.state_dict()])
    assert sum(entries) == sum(sizes) and max(entries) <= 50
