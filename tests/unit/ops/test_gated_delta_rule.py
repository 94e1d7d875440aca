"""The closed form of the decayed delta rule against its loop, at any length, with groups of heads and resets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.ops.delta_rule import gated_delta_rule, gated_delta_rule_naive

LENGTHS = (1, 3, 16, 17, 63, 130)
BATCH, GROUPS, HEADS, DIM, OUT = 2, 2, 4, 5, 3


def make_inputs(tokens: int, *, groups: int = GROUPS, with_eta: bool = True) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {
        "q": rand(BATCH, tokens, groups, DIM),
        "k": torch.nn.functional.normalize(rand(BATCH, tokens, groups, DIM), dim=-1),
        "v": rand(BATCH, tokens, HEADS, OUT),
        "log_alpha": -torch.nn.functional.softplus(rand(BATCH, tokens, HEADS)),
        "eta": torch.sigmoid(rand(BATCH, tokens, HEADS)) if with_eta else None,
        "state": rand(BATCH, HEADS, DIM, OUT),
    }
    return {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}


def results(function, inputs: dict[str, Tensor | None], **settings) -> list[Tensor]:
    """Outputs, last state, and the gradient of a weighted sum of both for every input."""
    outputs = function(**inputs, **settings)
    g = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in outputs)
    leaves = [x for x in inputs.values() if x is not None]
    return [*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize(("groups", "with_eta"), [(GROUPS, True), (1, True), (HEADS, False)])
def test_closed_form_equals_token_loop(tokens: int, erase: bool, groups: int, with_eta: bool):
    inputs = make_inputs(tokens, groups=groups, with_eta=with_eta)
    wanted = results(gated_delta_rule_naive, inputs, erase=erase)
    assert_all_close(results(gated_delta_rule, inputs, erase=erase, chunk_size=16), wanted)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("erase", [True, False])
def test_chunk_size_changes_nothing(chunk_size: int, erase: bool):
    inputs = make_inputs(63)
    wanted = gated_delta_rule_naive(**inputs, erase=erase)
    assert_all_close(gated_delta_rule(**inputs, erase=erase, chunk_size=chunk_size), wanted)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 40, 63])
def test_split_sequence_equals_one_pass(cut: int):
    inputs = make_inputs(63)
    state = inputs.pop("state")
    whole, last = gated_delta_rule(**inputs, state=state, chunk_size=16)
    first, middle = gated_delta_rule(**{n: x[:, :cut] for n, x in inputs.items()}, state=state, chunk_size=16)
    second, end = gated_delta_rule(**{n: x[:, cut:] for n, x in inputs.items()}, state=middle, chunk_size=16)
    assert_all_close([torch.cat([first, second], 1), end], [whole, last])


@pytest.mark.parametrize("erase", [True, False])
def test_a_decay_of_nothing_begins_a_memory_anew(erase: bool):
    """At several places of a chunk, side by side, and at its first token."""
    inputs, begins = make_inputs(40), [0, 5, 6, 16, 31]
    log_alpha = inputs.pop("log_alpha")
    reset = torch.zeros(BATCH, 40, HEADS, dtype=torch.bool)
    reset[:, begins] = True

    def with_resets(**parts: Tensor) -> tuple[Tensor, Tensor]:
        gate = parts.pop("log_alpha").masked_fill(reset, float("-inf"))
        return gated_delta_rule(**parts, log_alpha=gate, erase=erase, chunk_size=16)

    def apart(**parts: Tensor) -> tuple[Tensor, Tensor]:
        state, outputs = torch.zeros_like(parts.pop("state")), []
        for begin, end in zip(begins, [*begins[1:], 40], strict=True):
            part = {name: x[:, begin:end] for name, x in parts.items()}
            output, last = gated_delta_rule_naive(**part, state=state, erase=erase)
            outputs.append(output)
        return torch.cat(outputs, 1), last

    # A document's first decay acts on nothing, so it has no gradient.
    inputs["log_alpha"] = log_alpha
    assert_all_close(results(with_resets, inputs), results(apart, inputs))


@pytest.mark.parametrize("erase", [True, False])
def test_decays_beyond_the_range_of_float32_stay_finite(erase: bool):
    inputs = {name: x.detach().float() for name, x in make_inputs(40).items()}
    inputs["log_alpha"] = 100 * inputs["log_alpha"]
    found = gated_delta_rule(**inputs, erase=erase, chunk_size=16)
    wanted = gated_delta_rule_naive(**{name: x.double() for name, x in inputs.items()}, erase=erase)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_an_empty_sequence_returns_the_state():
    inputs = make_inputs(0)
    output, state = gated_delta_rule(**inputs)
    assert output.shape == (BATCH, 0, HEADS, OUT)
    assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 9, 4, 3)}, "v has shape"),
        ({"v": torch.zeros(2, 8, 3, 3)}, "v has 3 heads, but k has 2"),
        ({"state": torch.zeros(2, 4, 3, 5)}, "state has shape"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"state": torch.zeros(2, 4, 5, 3, dtype=torch.bfloat16)}, "memories are kept in float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str):
    for function in (gated_delta_rule, gated_delta_rule_naive):
        with pytest.raises(ValueError, match=message):
            function(**(make_inputs(8) | change))
