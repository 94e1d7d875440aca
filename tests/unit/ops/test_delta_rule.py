"""The closed form against the token loop, and the token loop against independently written models."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hopescale.ops.delta_rule import delta_rule, delta_rule_naive

LENGTHS = (1, 3, 16, 17, 63, 130)


def make_inputs(tokens: int, *, seed: int = 0, momentum: bool, dtype=torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    batch, heads, dim, out = 2, 3, 5, 4

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    inputs = {
        "k": torch.nn.functional.normalize(rand(batch, tokens, heads, dim), dim=-1),
        "u": rand(batch, tokens, heads, out),
        "eta": torch.sigmoid(rand(batch, tokens, heads)),
        "alpha": torch.sigmoid(rand(batch, tokens, heads) + 3),
        "state": rand(batch, heads, out, dim),
        "q": rand(batch, tokens, heads, dim),
    }
    if momentum:
        inputs |= {"mu": torch.sigmoid(rand(batch, tokens, heads)), "momentum": rand(batch, heads, out, dim)}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def outputs_and_gradients(function, inputs: dict[str, Tensor], **settings) -> tuple[list[Tensor], list[Tensor]]:
    result = [part for part in function(**inputs, **settings) if part is not None]
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(part.shape, generator=g, dtype=torch.float64) for part in result]
    loss = sum((part * weight).sum() for part, weight in zip(result, weights, strict=True))
    return result, torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(
    ("momentum", "erase", "read"),
    list(itertools.product((False, True), (False, True), ("prefix", "inclusive", "boundary"))),
)
def test_closed_form_equals_token_loop(tokens: int, momentum: bool, erase: bool, read: str):
    inputs = make_inputs(tokens, momentum=momentum)
    settings = {"erase": erase, "read": read, "chunk_size": 16}
    expected, expected_grads = outputs_and_gradients(delta_rule_naive, inputs, **settings)
    actual, actual_grads = outputs_and_gradients(delta_rule, inputs, **settings)
    for a, b in zip(actual + list(actual_grads), expected + list(expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
def test_chunk_size_changes_nothing(chunk_size: int):
    inputs = make_inputs(63, momentum=True)
    expected = delta_rule_naive(**inputs)
    for a, b in zip(delta_rule(**inputs, chunk_size=chunk_size), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 40, 63])
def test_split_sequence_equals_one_pass(cut: int):
    inputs = make_inputs(63, momentum=True)
    whole = delta_rule(**inputs, chunk_size=16)
    per_token = {n: t for n, t in inputs.items() if n not in ("state", "momentum")}
    first = delta_rule(
        **{n: t[:, :cut] for n, t in per_token.items()},
        state=inputs["state"],
        momentum=inputs["momentum"],
        chunk_size=16,
    )
    second = delta_rule(
        **{n: t[:, cut:] for n, t in per_token.items()}, state=first.state, momentum=first.momentum, chunk_size=16
    )
    torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole.output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(second.state, whole.state, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(second.momentum, whole.momentum, rtol=1e-10, atol=1e-10)


def test_later_tokens_change_no_earlier_output():
    inputs = make_inputs(40, momentum=True)
    before = delta_rule(**inputs, read="inclusive", chunk_size=16).output
    changed = dict(inputs)
    for name in ("k", "u", "eta", "alpha", "mu", "q"):
        changed[name] = inputs[name].detach().clone()
        changed[name][:, 25:] = changed[name][:, 25:] * 0.5
    after = delta_rule(**changed, read="inclusive", chunk_size=16).output
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 25:], before[:, 25:])


def test_zero_learning_rate_and_full_retention_keep_the_state():
    inputs = make_inputs(30, momentum=False)
    inputs |= {"eta": torch.zeros_like(inputs["eta"]), "alpha": torch.ones_like(inputs["alpha"])}
    torch.testing.assert_close(delta_rule(**inputs).state, inputs["state"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["alpha", "mu"])
def test_a_gate_of_zero_inside_a_chunk_is_exact(name: str):
    inputs = {n: t.detach().clone() for n, t in make_inputs(40, momentum=True).items()}
    inputs[name][:, 5] = 0.0
    inputs[name][:, 20:22] = 0.0
    for a, b in zip(delta_rule(**inputs), delta_rule_naive(**inputs), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_inputs_compute_in_the_states_type(dtype: torch.dtype):
    inputs = {n: t.detach() for n, t in make_inputs(130, momentum=True).items()}
    memory = ("state", "momentum")
    low = {n: t.float() if n in memory else t.to(dtype) for n, t in inputs.items()}
    result = delta_rule(**low)
    assert result.output.dtype == dtype
    assert result.state.dtype == result.momentum.dtype == torch.float32
    reference = delta_rule_naive(**{n: t.double() for n, t in low.items()})
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.output.double(), reference.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.state.double(), reference.state, rtol=1e-4, atol=1e-4)


def test_empty_sequence_returns_the_state():
    inputs = make_inputs(0, momentum=False)
    result = delta_rule(**inputs)
    assert result.output.shape == (2, 0, 3, 4)
    assert torch.equal(result.state, inputs["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 9, 3, 4)}, "u has shape"),
        ({"state": torch.zeros(2, 3, 5, 4)}, "state has shape"),
        ({"read": "after"}, "read is 'after'"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"momentum": torch.zeros(2, 3, 4, 5)}, "momentum is given without mu"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        delta_rule(**(make_inputs(8, momentum=False) | change))


# The familiar models, each written from its own definition (hope.md section 1, table). All read after the write.


def linear_attention(q, k, v):
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril()
    return torch.einsum("bhts,bshe->bthe", weights, v)


def retnet(q, k, v, gamma):
    position = torch.arange(q.shape[1], dtype=q.dtype)
    distance = position[:, None] - position[None, :]
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp_min(0), torch.zeros((), dtype=q.dtype))
    return torch.einsum("bhts,hts,bshe->bthe", torch.einsum("bthd,bshd->bhts", q, k), decay, v)


def mamba2(q, k, v, log_a, delta):
    total = log_a.cumsum(1)
    lag = total[:, :, None] - total[:, None]  # [B, T, S, H]
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, :, :, None]
    weights = torch.einsum("bthd,bshd->btsh", q, k) * torch.where(mask, lag.exp(), 0.0) * delta[:, None]
    return torch.einsum("btsh,bshe->bthe", weights, v)


def gated_delta_net(q, k, v, alpha, beta):
    """`S_t = alpha_t S_{t-1} (I - beta_t k k^T) + beta_t v k^T` (Gated Delta Networks, arXiv 2412.06464, Eq. 10)."""
    state = q.new_zeros(q.shape[0], q.shape[2], v.shape[-1], q.shape[-1])
    outputs = []
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    for t in range(q.shape[1]):
        key, b, a = k[:, t], beta[:, t, :, None, None], alpha[:, t, :, None, None]
        state = a * state @ (eye - b * key[..., :, None] * key[..., None, :])
        state = state + b * v[:, t, :, :, None] * key[..., None, :]
        outputs.append((state @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("tokens", [1, 17, 63])
def test_familiar_models_are_settings(tokens: int):
    inputs = {n: t.detach() for n, t in make_inputs(tokens, momentum=False).items()}
    q, k, v, gate, alpha = (inputs[n] for n in ("q", "k", "u", "eta", "alpha"))
    zero, ones = torch.zeros_like(inputs["state"]), torch.ones_like(gate)
    gamma = torch.tensor([0.9, 0.97, 0.99], dtype=q.dtype)
    beta = gate * alpha  # the rule erases eta k k^T after decay alpha, Gated DeltaNet alpha * beta k k^T
    settings = {"state": zero, "q": q, "read": "inclusive", "chunk_size": 16}

    def check(expected: Tensor, u: Tensor, eta: Tensor, retention: Tensor, erase: bool) -> None:
        actual = delta_rule(k, u, eta, retention, **settings, erase=erase).output
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    check(linear_attention(q, k, v), v, ones, ones, erase=False)
    check(retnet(q, k, v, gamma), v, ones, gamma.expand_as(gate), erase=False)
    check(mamba2(q, k, v, alpha.log(), gate), v, gate, alpha, erase=False)
    check(gated_delta_net(q, k, v, ones, gate), v, gate, ones, erase=True)
    check(gated_delta_net(q, k, v, alpha, gate), v / alpha[..., None], beta, alpha, erase=True)
