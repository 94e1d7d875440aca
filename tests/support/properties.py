"""What every mixer must be, whatever its settings: continuable, causal, by rows, trainable in all parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_trained(mixer: nn.Module, x: Tensor) -> None:
    """Check that every parameter gets a gradient of the outputs."""
    mixer(x)[0].square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def check_parts(mixer: nn.Module, x: Tensor, cuts: tuple[int, ...]) -> None:
    """Check that tokens `x` in parts give the outputs and the state of one pass."""
    (whole, last), state, parts = mixer(x), mixer.initial_state(x.shape[1]), []
    for part in torch.tensor_split(x, cuts):
        y, state = mixer(part, state)
        parts.append(y)
    close = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(torch.cat(parts), whole, **close)
    assert state.position == last.position == len(x)
    found = state.named()
    for name, tensor in last.named().items():
        torch.testing.assert_close(found[name], tensor, **close)


def check_causal(mixer: nn.Module, x: Tensor, place: int) -> None:
    """Check that tokens from `place` on of the second row change nothing before, and no other row."""
    changed = x.clone()
    changed[place:, 1] += 1.0
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-11)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-11)
    assert (after[place:, 1] - before[place:, 1]).abs().max() > 1e-3
