"""M3 against Algorithm 1 and its averaged form as plain loops, and against Muon."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hopescale.ops.newton_schulz import newton_schulz
from hopescale.optim.m3 import M3

BETAS = {"beta1": 0.7, "beta2": 0.8, "beta3": 0.6}
SHAPES = [(4, 6), (6, 4), (4, 6)]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(
    form: str, start: Tensor, grads: list[Tensor], f: int, alpha: float, second: bool, rms: float
) -> list[Tensor]:
    """Both loops of Algorithm 1 with all gradients at hand, so that a period's sum is taken from the list."""
    b1, b2, b3 = BETAS.values()
    w, lr, decay, eps = start.clone(), 0.1, 0.3, 1e-6
    m1, m2, v, weights = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), []
    for period in range(len(grads) // f):
        waiting = grads[(period - 1) * f : period * f] if period else []
        if waiting and form == "paper":
            m2 = m2 + b3 * sum(waiting)
        elif waiting:
            m2 = b3 * m2 + (1 - b3) * sum(waiting) / f
        slow = newton_schulz(m2)
        for t in range(period * f, (period + 1) * f):
            g = grads[t]
            if form == "paper":
                m1, v = m1 + b1 * g, v + b2 * g**2
                seen = v
            else:
                m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                seen = v / (1 - b2 ** (t + 1))
            update = newton_schulz(m1) + alpha * slow
            if second:
                update = update / (seen**0.5 + eps)
            if form == "ema":
                update = update * rms / (update**2).mean() ** 0.5
            w = w - lr * decay * w - lr * update
            weights.append(w)
    return weights


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(("frequency", "alpha"), [(1, 0.5), (3, 0.5), (4, 2.0), (3, 0.0)])
@pytest.mark.parametrize("form", ["ema", "paper"])
def test_it_is_the_algorithm(form: str, frequency: int, alpha: float, second: bool):
    start, grads = randn(3, 5, seed=0), [randn(3, 5, seed=step + 1) for step in range(12)]
    weight = nn.Parameter(start.clone())
    scale = {"update_rms": 0.4} if form == "ema" else {}
    rule = M3(
        [weight],
        0.1,
        **BETAS,
        alpha_slow=alpha,
        frequency=frequency,
        form=form,
        second_moment=second,
        eps=1e-6,
        weight_decay=0.3,
        **scale,
    )
    for g, expected in zip(grads, naive(form, start, grads, frequency, alpha, second, 0.4), strict=True):
        weight.grad = g.clone()
        rule.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_slow_memory_and_second_moment_it_is_torch_muon(nesterov: bool):
    ours, theirs = ([nn.Parameter(randn(*s, seed=i).float()) for i, s in enumerate(SHAPES)] for _ in "ab")
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    rule = M3(
        ours,
        0.02,
        beta1=0.9,
        alpha_slow=0,
        second_moment=False,
        weight_decay=0.1,
        nesterov=nesterov,
        adjust_lr_fn="original",
        ns_dtype=torch.bfloat16,
    )
    for step in range(20):
        for members, optimizer in ((ours, rule), (theirs, muon)):
            for i, p in enumerate(members):
                p.grad = randn(*p.shape, seed=100 * step + i).float()
            optimizer.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_an_update_has_the_root_mean_square_it_was_given():
    for settings, expected in (({}, 0.2), ({"update_rms": 1.5}, 1.5)):
        weight = nn.Parameter(torch.zeros(2, 6, 4))
        weight.grad = 1e-3 * randn(2, 6, 4, seed=0).float() * torch.tensor([1.0, 1e3]).view(2, 1, 1)
        M3([weight], 1.0, **settings).step()
        rms = weight.detach().square().mean(dim=(1, 2)).sqrt()
        torch.testing.assert_close(rms, torch.full((2,), expected), rtol=1e-4, atol=0)


def test_the_slow_memory_changes_once_a_period_and_counts_own_updates():
    fast, slow = (nn.Parameter(randn(4, 4, seed=i)) for i in range(2))
    rule = M3([fast, slow], frequency=3)
    changes = {fast: [], slow: []}
    for step in range(1, 13):
        fast.grad = randn(4, 4, seed=step)
        slow.grad = randn(4, 4, seed=step) if step % 2 == 0 else None
        before = {p: rule.state[p]["slow_direction"].clone() for p in changes}
        rule.step()
        for p, steps in changes.items():
            if not torch.equal(before[p], rule.state[p]["slow_direction"]):
                steps.append(step)
    assert changes == {fast: [3, 6, 9, 12], slow: [6, 12]}
    assert rule.state[slow]["step"] == 6


def test_the_state_holds_what_is_used():
    def names(**settings) -> set[str]:
        weight = nn.Parameter(torch.zeros(2, 3))
        return {*M3([weight], **settings).state[weight]}

    assert names() == {"step", "fast_momentum", "slow_momentum", "slow_direction", "second_moment"}
    assert names(alpha_slow=0.0, second_moment=False) == {"step", "fast_momentum"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "printed"}, "printed"),
        ({"form": "paper", "update_rms": 0.2}, "Algorithm 1 has none"),
        ({"form": "paper", "nesterov": True}, "Algorithm 1 has none"),
        ({"update_rms": 0.2, "adjust_lr_fn": "original"}, "give one"),
        ({"frequency": 0}, "frequency is 0"),
        ({"adjust_lr_fn": "none_such"}, "none_such"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        M3([nn.Parameter(torch.zeros(2, 2))], **settings)
