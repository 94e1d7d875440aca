"""The Triton kernels against the token loop: on a GPU where there is one, else in Triton's interpreter.

Needs `TRITON_INTERPRET=1` before Triton is imported; `tests/unit/ops/test_delta_rule_triton.py` sees to that.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hopescale.ops.delta_rule import delta_rule, delta_rule_naive

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"

READS = ("prefix", "inclusive", "boundary", None)


def make_inputs(
    tokens: int,
    dim: int = 16,
    out: int = 16,
    *,
    batch: int = 1,
    heads: int = 2,
    momentum: bool = True,
    query: bool = True,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    inputs = {
        "k": torch.nn.functional.normalize(rand(batch, tokens, heads, dim), dim=-1),
        "u": rand(batch, tokens, heads, out),
        "eta": torch.sigmoid(rand(batch, tokens, heads)),
        "alpha": torch.sigmoid(rand(batch, tokens, heads) + 3),
        "state": rand(batch, heads, out, dim),
    }
    if query:
        inputs["q"] = rand(batch, tokens, heads, dim)
    if momentum:
        inputs |= {"mu": torch.sigmoid(rand(batch, tokens, heads)), "momentum": rand(batch, heads, out, dim)}
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def results(function, inputs: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    """Outputs, and gradients of a random sum of them."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**inputs, **settings)._asdict()
    found = {name: tensor for name, tensor in output.items() if tensor is not None}
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(part.shape, generator=g).to(part) for part in found.values()]
    loss = sum((part * weight).sum() for part, weight in zip(found.values(), weights, strict=True))
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return found | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def check(inputs: dict[str, Tensor], *, tolerance: float = 1e-5, **settings) -> None:
    actual = results(delta_rule, inputs, **settings, backend="triton")
    expected = results(delta_rule_naive, {n: t.double() for n, t in inputs.items()}, **settings)
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(), exact, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_every_variant_equals_token_loop(momentum: bool, erase: bool, read: str | None):
    inputs = make_inputs(17, heads=1, momentum=momentum, query=read is not None)
    check(inputs, erase=erase, read=read or "prefix", chunk_size=16)


@pytest.mark.parametrize("tokens", [1, 3, 16, 63, 130])
def test_every_length_equals_token_loop(tokens: int):
    check(make_inputs(tokens, batch=2 if tokens == 3 else 1, heads=3 if tokens == 3 else 1))


@pytest.mark.parametrize(("dim", "out"), [(32, 48), (64, 64), (128, 16)])
def test_every_head_dim_equals_token_loop(dim: int, out: int):
    check(make_inputs(40, dim, out, heads=1), read="inclusive")


@pytest.mark.parametrize(("chunk_size", "read"), [(7, "prefix"), (1, "inclusive"), (50, "boundary"), (64, "boundary")])
def test_any_chunk_equals_token_loop(chunk_size: int, read: str):
    check(make_inputs(70 if chunk_size > 1 else 5, heads=1), chunk_size=chunk_size, read=read)


@pytest.mark.parametrize("momentum", [False, True])
def test_one_key_that_never_changes_is_stable(momentum: bool):
    inputs = make_inputs(130, heads=1, momentum=momentum)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["eta"] = torch.full_like(inputs["eta"], 0.999)
    inputs["alpha"] = torch.ones_like(inputs["alpha"])
    check(inputs)
    check(inputs, read="boundary")


@pytest.mark.parametrize("name", ["alpha", "mu"])
def test_a_gate_of_zero_harms_no_others(name: str):
    inputs = make_inputs(40, heads=1)
    inputs[name][:, 5] = 0.0
    inputs[name][:, 20:22] = 0.0
    actual = results(delta_rule, inputs, backend="triton")
    expected = results(delta_rule_naive, {n: t.double() for n, t in inputs.items()})
    for gates in (actual, expected):
        for zero in (5, 20, 21):
            gates[f"d_{name}"][:, zero] = 0.0
    for key, exact in expected.items():
        torch.testing.assert_close(actual[key].double(), exact, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = make_inputs(40, heads=1)
    memory = ("state", "momentum")
    low = {n: t if n in memory else t.bfloat16() for n, t in inputs.items()}
    actual = results(delta_rule, low, backend="triton")
    expected = results(delta_rule_naive, {n: t.double() for n, t in low.items()})
    assert actual["output"].dtype == actual["d_k"].dtype == torch.bfloat16
    torch.testing.assert_close(actual["state"].double(), expected["state"], rtol=1e-5, atol=1e-5)
    for name, exact in expected.items():
        atol = 1e-2 * max(1.0, exact.abs().max().item())
        torch.testing.assert_close(actual[name].double(), exact, rtol=0, atol=atol)


def test_empty_sequence_returns_the_state():
    inputs = make_inputs(0)
    result = delta_rule(**inputs, backend="triton")
    assert result.output.shape == (1, 0, 2, 16)
    assert torch.equal(result.state, inputs["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 24}, "k has 24"),
        ({"out": 20}, "u has 20"),
    ],
)
def test_shapes_that_no_kernel_knows_are_named(change: dict, message: str):
    inputs = make_inputs(4, **change)
    with pytest.raises(ValueError, match=message):
        delta_rule(**inputs, backend="triton")
    delta_rule(**inputs)


def test_long_boundary_chunks_and_float64_are_refused():
    inputs = make_inputs(4)
    with pytest.raises(ValueError, match="chunk_size is 65"):
        delta_rule(**inputs, backend="triton", read="boundary", chunk_size=65)
    with pytest.raises(ValueError, match="state is torch.float64"):
        delta_rule(**{n: t.double() for n, t in inputs.items()}, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="flash-linear-attention needs a GPU")
def test_gated_delta_net_equals_flash_linear_attention():
    """Gated DeltaNet is a setting of the delta rule; those kernels take bfloat16."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule", reason="flash-linear-attention is not installed")
    inputs = make_inputs(300, 64, 64, batch=2, momentum=False)
    q, k, v = (inputs[name].bfloat16() for name in ("q", "k", "u"))
    alpha, beta = inputs["alpha"], inputs["eta"]
    expected, last = fla.chunk_gated_delta_rule(
        q,
        k,
        v,
        g=alpha.log(),
        beta=beta,
        scale=1.0,
        initial_state=inputs["state"].mT.contiguous(),
        output_final_state=True,
    )
    values = v.float() / alpha[..., None]
    actual = delta_rule(k, values, alpha * beta, alpha, inputs["state"], q=q, read="inclusive", backend="triton")
    for mine, theirs in ((actual.output, expected), (actual.state, last.mT)):
        assert (mine - theirs).float().norm() < 1e-2 * theirs.float().norm()
