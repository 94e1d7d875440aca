"""What holds for every rule: it converges, its state is all there is to it, and stacking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hopescale.optim.adamw import AdamW
from hopescale.optim.deep_momentum import DeepMomentum
from hopescale.optim.delta_momentum import DeltaMomentum
from hopescale.optim.dgd import DGD
from hopescale.optim.m3 import M3
from hopescale.optim.muon import Muon
from hopescale.optim.stacked import STACK_ELEMENTS

SHAPES = [(4, 6), (6, 4), (4, 6), (3, 4, 6), (4, 6), (3, 4, 6), (5, 5)]


def make_dgd(members: list[nn.Parameter], lr: float = 1e-3, **settings) -> DGD:
    for p in members:
        p.gram = 0.1 * torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return DGD(members, lr, **settings)


# For each rule a learning rate for the quadratic, and to which fraction its loss falls in 200 steps.
RULES: dict[str, tuple[Callable, float, float]] = {
    "adamw": (AdamW, 0.1, 0.05),
    "muon": (Muon, 0.1, 0.05),
    "m3": (M3, 0.4, 0.05),
    "m3-paper": (partial(M3, form="paper", eps=1.0), 0.4, 0.7),
    "m3-plain": (partial(M3, alpha_slow=0, second_moment=False, adjust_lr_fn="original"), 0.1, 0.05),
    "delta": (DeltaMomentum, 0.02, 0.05),
    "delta-second": (partial(DeltaMomentum, beta2=0.9), 0.02, 0.05),
    "deep": (DeepMomentum, 0.05, 0.05),
    "deep-linear": (partial(DeepMomentum, memory="linear"), 0.05, 0.05),
    "deep-rms": (partial(DeepMomentum, update_rms=0.2), 0.2, 0.05),
    "dgd": (make_dgd, 0.2, 0.05),
}
every_rule = pytest.mark.parametrize("name", RULES)
stacked_rules = pytest.mark.parametrize("name", [name for name in RULES if name != "adamw"])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def make(name: str, members: list[nn.Parameter], **settings) -> torch.optim.Optimizer:
    rule, lr, _ = RULES[name]
    return rule(members, **{"lr": lr} | settings)


def feed(members: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(members):
        p.grad = randn(*p.shape, seed=1000 * step + i + 50, dtype=p.dtype)


@every_rule
def test_it_converges_on_a_noisy_quadratic(name: str):
    """Curvatures are from 0.1 to 10; learning rates fall to zero. Algorithm 1 as printed only descends."""
    rule, lr, fraction = RULES[name]
    weight, scale = nn.Parameter(randn(6, 4, seed=0)), torch.logspace(-0.5, 0.5, 4)
    optimizer = rule([weight], lr=lr, weight_decay=0.0)
    losses = []
    for step in range(201):
        losses.append(0.5 * (weight.detach() * scale).square().sum().item())
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 200)
        weight.grad = weight.detach() * scale.square() + randn(6, 4, seed=step + 1)
        optimizer.step()
    assert losses[-1] < fraction * losses[0]


@every_rule
def test_state_copied_into_a_fresh_optimizer_continues_bit_for_bit(name: str):
    first = make_parameters()
    one = make(name, first)
    for step in range(5):
        feed(first, step)
        one.step()
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = make(name, second)
    assert [{*other.state[q]} for q in second] == [{*one.state[p]} for p in first]
    for p, q in zip(first, second, strict=True):
        for key, tensor in other.state[q].items():
            assert tensor.shape == one.state[p][key].shape and tensor.dtype == one.state[p][key].dtype
            tensor.copy_(one.state[p][key])
    third = [nn.Parameter(p.detach().clone()) for p in first]
    torchs = make(name, third)
    torchs.load_state_dict(deepcopy(one.state_dict()))
    for step in range(5, 14):
        for members, optimizer in ((first, one), (second, other), (third, torchs)):
            feed(members, step)
            optimizer.step()
    for p, q, r in zip(first, second, third, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


@every_rule
def test_state_is_tensors_that_are_there_before_the_first_step(name: str):
    members = make_parameters()
    optimizer = make(name, members)
    before = {p: dict(optimizer.state[p]) for p in members}
    feed(members, 0)
    optimizer.step()
    for p in members:
        assert optimizer.state[p].keys() == before[p].keys()
        for key, tensor in optimizer.state[p].items():
            assert tensor is before[p][key]
            assert tensor._base is None, "a view would be saved with all it is a view of"
            assert tensor.dtype == torch.float32
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert all(step.shape == () and step == 1 for step in steps)


@stacked_rules
def test_stacks_equal_one_parameter_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    """At once, in stacks of two, in parts of a parameter, alone, and in another order."""
    results = []
    runs = ((None, False, 1), (2 * 24, False, 1), (1, False, 1), (None, True, 1), (None, False, -1))
    for size, separate, order in runs:
        members = make_parameters(torch.float64)
        with monkeypatch.context() as patch:
            if size:
                patch.setitem(STACK_ELEMENTS, "cpu", size)
            optimizers = [make(name, [p]) for p in members] if separate else [make(name, members[::order])]
            for step in range(6):
                feed(members, step)
                for optimizer in optimizers:
                    optimizer.step()
        results.append([p.detach() for p in members])
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@every_rule
def test_a_parameter_without_gradient_is_left_alone(name: str):
    """Also while others of its shape are updated; it is behind them afterwards, and stays so."""
    members, alone = make_parameters(torch.float64), make_parameters(torch.float64)
    optimizer, separate = make(name, members), [make(name, [p]) for p in alone]
    for step in range(6):
        for p in (members, alone):
            feed(p, step)
        if step % 3 != 2:
            members[2].grad = alone[2].grad = None
            before = members[2].detach().clone(), {k: t.clone() for k, t in optimizer.state[members[2]].items()}
        optimizer.step()
        for one in separate:
            one.step()
        if step % 3 != 2:
            assert torch.equal(members[2], before[0])
            assert all(torch.equal(tensor, before[1][k]) for k, tensor in optimizer.state[members[2]].items())
    for p, q in zip(members, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@every_rule
def test_weight_decay_alone_shrinks(name: str):
    """With a fresh state a gradient of zeros moves nothing by itself, except by DGD's decay along its inputs."""
    members = make_parameters()
    before = [p.detach().clone() for p in members]
    optimizer = make(name, members, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for p in members:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    factor = 0.95**3 / ((1 + 0.1 * 0.1) ** 3 if name == "dgd" else 1)
    for p, start in zip(members, before, strict=True):
        torch.testing.assert_close(p.detach(), factor * start)


@every_rule
def test_zero_gradients_after_others_stay_finite(name: str):
    """Rules with a momentum coast on; deep momentum and DGD do not."""
    members = make_parameters()
    optimizer = make(name, members, weight_decay=0.0)
    feed(members, 0)
    optimizer.step()
    before = [p.detach().clone() for p in members]
    for p in members:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = [not torch.equal(p, start) for p, start in zip(members, before, strict=True)]
    assert all(moved) if not name.startswith("deep") else not any(moved)
    assert all(torch.isfinite(p).all() for p in members)


@stacked_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions_agree(name: str, dtype: torch.dtype):
    wide, own = make_parameters(torch.float64), make_parameters(dtype)
    for members in (wide, own):
        optimizer = make(name, members)
        for step in range(2):
            feed(members, step)
            optimizer.step()
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 0.0}[dtype]
    for p, q in zip(wide, own, strict=True):
        assert q.dtype == dtype
        assert (p.detach() - q.detach().double()).norm() <= tolerance * p.detach().norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@stacked_rules
def test_a_gpu_agrees_with_the_cpu(name: str):
    here, there = make_parameters(), [nn.Parameter(p.detach().cuda()) for p in make_parameters()]
    settings = {"ns_dtype": torch.float32} if name.startswith(("muon", "m3")) else {}
    rules = make(name, here, **settings), make(name, there, **settings)
    for step in range(3):
        feed(here, step)
        for p, q in zip(here, there, strict=True):
            q.grad = p.grad.cuda()
        for rule in rules:
            rule.step()
    for p, q in zip(here, there, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=1e-3, atol=1e-4)


@stacked_rules
def test_vectors_are_refused(name: str):
    with pytest.raises(ValueError, match=r"updates matrices, but a parameter has shape \(4,\)"):
        make(name, [nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(4))])


@stacked_rules
def test_a_closure_is_called_with_gradients_on(name: str):
    weight = nn.Parameter(randn(3, 4, seed=0))
    optimizer, before = make(name, [weight]), weight.detach().clone()

    def closure() -> Tensor:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(weight, before)
