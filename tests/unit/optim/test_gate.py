"""Steps through a gate: a good one is the step without, a bad one is none, whatever its gradients are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hopescale.config.schema import DeltaMomentumConfig, GroupConfig, M3Config, OptimConfig, ScheduleConfig
from hopescale.cost.updates import Wire
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.adamw import AdamW
from hopescale.optim.gate import StepGate
from hopescale.parallel.layers import ParameterSpec, attach

SHAPES = {"a": (4, 6), "b": (4, 6), "slow": (6, 4), "heads": (3, 4, 6)}
BAD = {3: math.nan, 4: 1.0, 7: math.inf}
"""Factors on the gradients of bad steps; all is due at step 4, and at step 7 the slow one waits."""


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_optimizer(rule: str, dtype: torch.dtype, wire: Wire = "fp32") -> OuterOptimizer:
    groups = {"b": GroupConfig(rule=rule, match=("b",), weight_decay=0.0), "rest": GroupConfig(rule=rule)}
    moments = {"m3": M3Config(frequency=2), "delta_momentum": DeltaMomentumConfig(beta2=0.9)}
    config = OptimConfig(lr=0.1, groups=groups, schedule=ScheduleConfig(min_lr_ratio=1.0), **moments)
    values = {name: randn(*shape, seed=index).to(dtype) for index, (name, shape) in enumerate(SHAPES.items())}
    parameters = {name: attach(nn.Parameter(value), ParameterSpec()) for name, value in values.items()}
    return OuterOptimizer(parameters, config, 10, {"slow": Cadence(4, wire=wire)})


def feed(optimizer: OuterOptimizer, step: int) -> Tensor:
    """Let a backward pass end; return the global norm."""
    for index, parameter in enumerate(optimizer.parameters.values()):
        gradient = BAD.get(step, 1.0) * randn(*parameter.shape, seed=100 * step + index)
        parameter.backward(gradient.to(parameter.dtype))
        if (gram := getattr(parameter, "gram", None)) is not None:
            inputs = BAD.get(step, 1.0) * randn(5, gram.shape[-1], seed=100 * step + index)
            gram += inputs.mT @ inputs
    optimizer.reduce(optimizer.due(step))
    return optimizer.grad_norms({"due": optimizer.due(step)})["due"]


def kept(optimizer: OuterOptimizer) -> dict[str, Tensor]:
    parts = {"weight": optimizer.weights(), "state": optimizer.state_dict(), "sum": optimizer.sums()}
    return {f"{kind} {name}": t.clone() for kind, tensors in parts.items() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "wire"),
    [
        *((rule, "fp32") for rule in ("adamw", "muon", "m3", "delta_momentum", "deep_momentum", "dgd")),
        *(("adamw", "int8"), ("adamw", "bf16"), ("muon", "int4")),
    ],
)
def test_a_run_through_gates_is_the_run_that_refuses_bad_steps(rule: str, wire: Wire, dtype: torch.dtype):
    refusing, gated = make_optimizer(rule, dtype, wire), make_optimizer(rule, dtype, wire)
    assert gated.is_gated
    for step in range(1, 10):
        norm = feed(refusing, step)
        if step in BAD:
            refusing.discard(step)
        else:
            refusing.step(step, norm)
        gated.step(step, feed(gated, step), StepGate(torch.tensor(step not in BAD)))
        if step in BAD:
            gated.take_back(step)
        found, expected = kept(gated), kept(refusing)
        assert found.keys() == expected.keys() and any(name.startswith("sum slow") for name in found)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} after step {step}"
    assert gated.dropped_at == refusing.dropped_at == 7


@pytest.mark.parametrize("beta1", [0.9, 0.3, 0.0])
def test_adamw_through_a_gate_is_torchs_to_the_bit(beta1: float):
    """Of lengths that vectors of a processor divide, and do not."""
    values = [randn(length, seed=length) for length in (1, 7, 64, 1000, 4097)]
    sets = [[nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    settings = {"lr": 0.013, "betas": (beta1, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    torchs, ours = torch.optim.AdamW(sets[0], foreach=True, **settings), AdamW(sets[1], **settings)
    for step in range(1, 6):
        for members in sets:
            for p in members:
                p.grad = randn(len(p), seed=step) * randn(len(p), seed=step + 100).mul(5).exp()
        torchs.step()
        ours.step_through(StepGate(torch.tensor(True)))
        assert all(torch.equal(a, b) for a, b in zip(*sets, strict=True)), f"step {step}"
    for p, q in zip(*sets, strict=True):
        assert all(torch.equal(torchs.state[p][key], value) for key, value in ours.state[q].items())
