"""The fused self-modifying kernels against loops over chunks and tokens: on a GPU where there is one, else interpreted.

Needs `TRITON_INTERPRET=1` before Triton is imported; `tests/unit/ops/test_self_modifying_triton.py` sees to that.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.backends import Products
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying import (
    Memories,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
    self_modifying,
    self_modifying_naive,
)
from hopescale.ops.self_modifying.packed import pack
from hopescale.parallel.mesh import Mesh
from tests.support.interpreter import teach_tensor_cores

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    teach_tensor_cores()

SWITCHES = {
    "two memories": {"adaptive": ("v", "alpha")},
    "all memories": {"query": "memory", "read": "inclusive", "error_cap": 0.3, "eta_max": 2.0, "memory_dim": 32},
    "linear": {"memory": "linear", "query": "memory", "error_cap": 0.5, "read": "inclusive"},
    "linear dot, plain gradient": {"memory": "linear", "objective": "dot", "inner_rule": "gd", "momentum": False},
    "boundary, dot": {"read": "boundary", "objective": "dot", "momentum": False, "adaptive": ("k", "eta")},
    "linear boundary": {"read": "boundary", "memory": "linear", "adaptive": ("k",)},
    "plain gradient": {
        "inner_rule": "gd",
        "adaptive": ("v", "eta"),
        "retention": False,
        "momentum_write": "whole",
    },
    "value targets": {"adaptive": (), "targets": "value", "momentum": False, "retention": False},
    "linear value targets": {"adaptive": (), "targets": "value", "memory": "linear", "momentum_write": "whole"},
    "value targets, dot": {"adaptive": (), "targets": "value", "objective": "dot"},
    "normalized writes": {"adaptive": ("k", "eta"), "normalize_writes": True, "error_cap": 0.8},
}
STATIC = {"adaptive": (), "targets": "value", "memory": "linear", "objective": "dot"}


def make_mixer(config: SelfModifyingConfig, heads: int, dim: int) -> SelfModifying:
    model = ModelConfig(d_model=8, num_heads=heads, head_dim=dim, mixers={"hope": config})
    return SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend="torch")


def make_inputs(mixer: SelfModifying, tokens: int, batch: int) -> dict[str, Tensor]:
    """Streams and what is carried, away from the structured start, so that every term of the equations matters."""
    g = torch.Generator().manual_seed(0)
    state = mixer.banks["memory"].initial_state(batch, mixer.config.momentum)
    heads, dim = mixer.heads, mixer.head_dim
    size = 4 if mixer.config.normalize_writes else 0.7  # of about half the tokens writes are made smaller

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    inputs = {name: torch.nn.functional.normalize(rand(batch, heads, tokens, dim), dim=-1) for name in "kvq"}
    inputs |= {"eta": rand(batch, heads, tokens) - 1}
    if mixer.config.retention:
        inputs["alpha"] = rand(batch, heads, tokens) + 4
    if mixer.config.momentum:
        inputs["mu"] = rand(batch, heads, tokens)
    for kind, weights in (("running", state.running), ("momentum", state.momentum)):
        if weights is not None:
            parts = {n: x for n, x in weights._asdict().items() if x is not None}
            inputs |= {f"{kind}/{n}": size * rand(*x.shape) / x.shape[-2] ** 0.5 for n, x in parts.items()}
    return inputs


def split(inputs: dict[str, Tensor]) -> tuple[Streams, Memories]:
    weights = {
        kind: Weights(*(inputs.get(f"{kind}/{name}") for name in Weights._fields)) for kind in ("running", "momentum")
    }
    streams = Streams(*(inputs.get(name) for name in Streams._fields))
    momentum = weights["momentum"] if "momentum/w_in" in inputs else None
    return streams, Memories(MemoryState(weights["running"], momentum, weights["running"]), None)


def fused(
    mixer: SelfModifying, inputs: dict[str, Tensor], documents: Documents | None = None, products: Products = "tf32x3"
) -> SelfModifyingOutput:
    from hopescale.ops.self_modifying.triton.function import self_modifying_triton

    return self_modifying_triton(*split(inputs), mixer.spec, documents, products=products)


def looped(mixer: SelfModifying, inputs: dict[str, Tensor]) -> SelfModifyingOutput:
    return self_modifying(*split(inputs), mixer.spec, backend="torch")


def token_by_token(
    mixer: SelfModifying, inputs: dict[str, Tensor], documents: Documents | None = None
) -> SelfModifyingOutput:
    return self_modifying_naive(*split(inputs), mixer.spec, documents=documents)


def outputs(output: SelfModifyingOutput) -> dict[str, Tensor]:
    found = {"y": output.y, "stats": output.stats}
    for kind in ("running", "momentum", "boundary"):
        weights = getattr(output.state.memory, kind)
        found |= {f"{kind}/{n}": x for n, x in (weights._asdict() if weights else {}).items() if x is not None}
    return found


def results(function, mixer: SelfModifying, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, and gradients of a random sum of them."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    found = outputs(function(mixer, inputs))
    g = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(part.shape, generator=g).to(part) for name, part in found.items()}
    loss = sum((part * weights[name]).sum() for name, part in found.items() if name != "stats")
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return found | {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def check(config: dict, tokens: int, *, batch: int = 1, heads: int = 1, dim: int = 16, tolerance: float = 1e-5) -> None:
    mixer = make_mixer(replace(SelfModifyingConfig(chunk_size=16), **config), heads, dim)
    compare(mixer, make_inputs(mixer, tokens, batch), looped, tolerance)


def compare(mixer: SelfModifying, inputs: dict[str, Tensor], reference, tolerance: float = 1e-5, run=fused) -> None:
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    actual = results(run, mixer, inputs)
    expected = results(reference, mixer, {n: t.double() for n, t in inputs.items()})
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        scale = max(0.1, exact.abs().max().item())
        torch.testing.assert_close(
            actual[name].double(), exact, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", SWITCHES)
def test_every_variant_equals_the_loop(name: str):
    check(SWITCHES[name], 21)


@pytest.mark.parametrize(("chunk_size", "tokens"), [(40, 45), (128, 5), (1, 2)])
def test_any_chunk_equals_the_loop(chunk_size: int, tokens: int):
    check({"chunk_size": chunk_size, "read": "inclusive", "adaptive": ("k",)}, tokens)


@pytest.mark.parametrize("memory", ["mlp", "linear"])
def test_chunks_of_several_pieces_equal_the_loop(memory: str, monkeypatch: pytest.MonkeyPatch):
    from hopescale.ops.self_modifying.triton import kernel_config

    monkeypatch.setattr(kernel_config, "KERNEL_PIECE", 16)
    read = "inclusive" if memory == "mlp" else "boundary"
    check({"memory": memory, "chunk_size": 40, "read": read, "adaptive": ("k", "eta")}, 45)


def test_heads_and_sequences_are_apart():
    check({"memory": "linear", "adaptive": ("eta",)}, 3, batch=2, heads=3)


@pytest.mark.parametrize(("dim", "hidden", "tokens"), [(32, 16, 19), (64, 128, 3), (128, 32, 3)])
def test_every_width_equals_the_loop(dim: int, hidden: int, tokens: int):
    check({"memory_dim": hidden, "adaptive": ("v",)}, tokens, dim=dim)


@pytest.mark.skipif(INTERPRETED, reason="too slow in the interpreter")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dim", [64, 128])
def test_whole_sequences_equal_the_loop(dim: int, switch: str):
    check(SWITCHES[switch] | {"chunk_size": 64, "memory_dim": None}, 333, batch=2, heads=2, dim=dim, tolerance=1e-4)


@pytest.mark.parametrize(
    ("objective", "momentum", "erase", "read"),
    list(itertools.product(("dot",), (False, True), (False, True), ("prefix", "inclusive")))
    + [("l2", True, True, "prefix"), ("l2", False, False, "inclusive")],
)
def test_static_memories_equal_the_token_loop(objective: str, momentum: bool, erase: bool, read: str):
    rule = {"momentum": momentum, "inner_rule": "dgd" if erase else "gd", "read": read, "retention": erase or momentum}
    mixer = make_mixer(replace(SelfModifyingConfig(chunk_size=16), **STATIC | rule | {"objective": objective}), 1, 16)
    compare(mixer, make_inputs(mixer, 17, 1), token_by_token)


@pytest.mark.parametrize("tokens", [1, 3, 63])
def test_static_memories_of_every_length_equal_the_token_loop(tokens: int):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=16, **STATIC), 1, 16)
    compare(mixer, make_inputs(mixer, tokens, 1), token_by_token)


@pytest.mark.parametrize("momentum", [False, True])
def test_one_key_that_never_changes_is_stable(momentum: bool):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=32, momentum=momentum, retention=False, **STATIC), 1, 16)
    inputs = make_inputs(mixer, 63, 1)
    inputs["k"] = inputs["k"][:, :, :1].expand_as(inputs["k"])
    inputs["eta"] = torch.full_like(inputs["eta"], 7.0)
    compare(mixer, inputs, token_by_token)


@pytest.mark.parametrize("name", ["alpha", "mu"])
def test_a_gate_of_zero_harms_no_others(name: str):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=16, **STATIC), 1, 16)
    inputs = make_inputs(mixer, 23, 1)
    inputs[name][:, :, [5, 19, 20]] = -200.0
    compare(mixer, inputs, token_by_token)


@pytest.mark.parametrize(
    ("products", "memory", "dim"),
    [
        *itertools.product(("bf16", "tf32"), ("mlp", "linear"), (16,)),
        pytest.param("bf16", "linear", 128, marks=pytest.mark.nightly if INTERPRETED else ()),
    ],
)
def test_narrow_products_err_like_rounded_streams(products: str, memory: str, dim: int):
    """Relative errors against float64, on the average over outputs and states and over gradients; each is rounded.

    The measure is the error of streams rounded to bfloat16. It is 1e-3 and more, that of exact products 1e-6 and less.
    """
    adaptive = ("eta",) if dim == 16 else ("k", "v", "eta", "alpha")
    mixer = make_mixer(replace(SelfModifyingConfig(chunk_size=4), memory=memory, adaptive=adaptive), 1, dim)
    inputs = make_inputs(mixer, 17 if memory == "linear" else 7, 1)  # the fifth chunk begins with a state that is kept
    exact = results(looped, mixer, {name: x.double() for name, x in inputs.items()})
    rounded = {name: x.bfloat16() if name in Streams._fields else x for name, x in inputs.items()}
    rounded = results(looped, mixer, {name: x.double() for name, x in rounded.items()})
    there = {name: x.to(DEVICE) for name, x in inputs.items()}
    actual = results(partial(fused, products=products), mixer, there)
    errors = [
        {name: ((x.cpu().double() - exact[name]).norm() / exact[name].norm()).item() for name, x in found.items()}
        for found in (actual, rounded)
    ]
    least, times = 1e-4, 2 if products == "bf16" else 1
    for names in (list(exact)[: -len(inputs)], list(exact)[-len(inputs) :]):
        mine, most = (sum(error[name] for name in names) for error in errors)
        assert least * len(names) < mine < times * most, (mine, most, errors)
    assert min(errors[0].values()) > 0


@triton.jit
def multiply_kernel(a, b, c, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@pytest.mark.parametrize(
    ("products", "expected"), [("tf32", 1.0), ("tf32x3", 1 + 2**-10), ("ieee", 1 + 2**-10 + 2**-22)]
)
def test_products_lose_what_tensor_cores_lose(products: str, expected: float):
    """The square of `1 + 2^-11`, whose last bit is the first that TF32 lacks."""
    one = torch.eye(16, device=DEVICE) * (1 + 2**-11)
    result = torch.empty_like(one)
    multiply_kernel[(1,)](one, one, result, products)
    assert torch.equal(result, torch.eye(16, device=DEVICE) * expected)


@pytest.mark.parametrize(
    ("memory", "back"),
    [
        pytest.param("linear", True, marks=pytest.mark.smoke),
        pytest.param("mlp", False, marks=pytest.mark.smoke),  # its kernel back takes the longest to compile
        ("mlp", True),
    ],
)
def test_kernels_of_a_recipe_equal_the_loop_and_give_the_same_bits_again(memory: str, back: bool):
    """On a GPU all of Hope's memories with bf16 products in heads of 64, which `train` runs there; else fewer."""
    config = SelfModifyingConfig(chunk_size=64, memory=memory)
    if INTERPRETED:
        config = replace(config, chunk_size=4, adaptive=("eta",))
    heads, dim, tokens, batch = (1, 16, 5, 1) if INTERPRETED else (2, 64, 333, 2)
    mixer = make_mixer(config, heads, dim)
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(mixer, tokens, batch).items()}
    found = results if back else torch.no_grad()(lambda function, *given: outputs(function(*given)))
    exact = found(looped, mixer, {name: x.double() for name, x in inputs.items()})
    first, again = (found(partial(fused, products="bf16"), mixer, inputs) for _ in range(2))
    for name, expected in exact.items():
        assert torch.equal(first[name], again[name]), name
        assert (first[name].double() - expected).norm() < 0.05 * max(1.0, expected.norm()), name


@pytest.mark.parametrize("read", ["prefix", "boundary"])
def test_a_pass_without_gradients_is_the_same(read: str):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=4, memory="linear", adaptive=("v",), read=read), 1, 16)
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(mixer, 6, 1).items()}
    with torch.no_grad():
        actual = self_modifying(*split(inputs), mixer.spec, backend="triton")
    expected = looped(mixer, {name: x.double() for name, x in inputs.items()})
    mine, right = ([state.w_in for state in output.state.memory] for output in (actual, expected))
    pairs = [(actual.y, expected.y), (actual.stats, expected.stats), *zip(mine, right, strict=True)]
    for mine, right in pairs:
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


DOCUMENTS = {
    "pieces": ([[1, 19], [17, 3]], {"adaptive": ("eta",), "chunk_size": 40}),
    "static": ([[1, 1, 6], [5, 1, 2]], STATIC | {"chunk_size": 1, "momentum": False}),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed_documents_equal_the_token_loop_over_each(name: str):
    rows, changes = DOCUMENTS[name]
    documents = Documents.of(torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in rows]))
    mixer = make_mixer(SelfModifyingConfig(**changes), 2, 16)
    inputs = make_inputs(mixer, sum(rows[0]), len(rows))
    inputs = {name: part[:1] if "/" in name else part for name, part in inputs.items()}
    there = documents._replace(first=documents.first.to(DEVICE), offsets=documents.offsets.to(DEVICE))
    compare(mixer, inputs, partial(token_by_token, documents=documents), run=partial(fused, documents=there))


@pytest.mark.parametrize("name", ["all memories", "linear", "linear boundary"])
def test_learned_weights_are_packed_as_if_they_were_laid_out(name: str):
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig
    from hopescale.ops.self_modifying.triton.start import pack_start, unpack_start

    mixer = make_mixer(replace(SelfModifyingConfig(), **SWITCHES[name]), 2, 16).to(DEVICE)
    momentum, bank, g = mixer.config.momentum, mixer.banks["memory"], torch.Generator().manual_seed(0)
    for each in bank.parameters():
        torch.nn.init.normal_(each, generator=g)
    start, x = bank.start(momentum), torch.zeros(1, 2, 1, 16)
    config = KernelConfig.of(Streams(x, x, x, x[..., 0], None, x[..., 0] if momentum else None), mixer.spec, "tf32x3")
    expected = pack(start.expand(1).running, mixer.spec, share=False)
    packed, zeros = pack_start(config, start.tensors)
    assert torch.equal(packed, expected) and (not zeros.any() if momentum else zeros is None)
    gradient = torch.randn(3, *packed.shape[1:], generator=g).to(DEVICE)  # of three documents
    mine = unpack_start(config, start.tensors, gradient)
    right = torch.autograd.grad(expected, start.tensors, gradient.sum(0, keepdim=True))
    for found, wanted in zip(mine, right, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [None, [[1, 2], [3]]], ids=["whole", "documents"])
def test_sequences_that_begin_with_learned_weights_equal_the_loop(rows: list[list[int]] | None):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=2, **STATIC), 1, 16).to(DEVICE)
    bank = mixer.banks["memory"]
    torch.nn.init.normal_(bank.mem.w, std=0.3, generator=torch.Generator().manual_seed(1))
    ids = [[n for n, size in enumerate(row) for _ in range(size)] for row in rows or []]
    documents = Documents.of(torch.tensor(ids, device=DEVICE)) if rows else None
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in make_inputs(mixer, 3, 2).items() if "/" not in name}
    found = []
    for backend in ("triton", "torch"):
        streams = Streams(*(inputs.get(name) for name in Streams._fields))
        output = self_modifying(streams, bank.start(True), mixer.spec, documents=documents, backend=backend)
        last = output.state.memory.running.w_in
        wanted = [*inputs.values(), *bank.parameters()]
        found.append([output.y, last, *torch.autograd.grad(output.y.sin().sum() + last.sin().sum(), wanted)])
    for kernels, loop in zip(*found, strict=True):
        torch.testing.assert_close(kernels, loop, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="flash-linear-attention needs a GPU")
def test_gated_delta_net_equals_flash_linear_attention():
    """Gated DeltaNet is a setting of static memories; those kernels take bfloat16."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule", reason="flash-linear-attention is not installed")
    mixer = make_mixer(SelfModifyingConfig(momentum=False, read="inclusive", **STATIC), 2, 64)
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(mixer, 300, 2).items()}
    q, k, v = (inputs[name].bfloat16() for name in "qkv")
    alpha, beta = (torch.sigmoid(inputs[name]) for name in ("alpha", "eta"))
    expected, last = fla.chunk_gated_delta_rule(
        *(x.transpose(1, 2) for x in (q, k, v, alpha.log(), beta)),
        scale=1.0,
        initial_state=inputs["running/w_in"],
        output_final_state=True,
    )
    inputs |= {"k": k.float(), "q": q.float(), "v": v.float() / alpha[..., None], "eta": torch.logit(alpha * beta)}
    actual = fused(mixer, inputs)
    for mine, theirs in ((actual.y, expected.transpose(1, 2)), (actual.state.memory.running.w_in, last)):
        assert (mine - theirs).float().norm() < 1e-2 * theirs.float().norm()


def test_an_empty_sequence_returns_the_state():
    mixer = make_mixer(SelfModifyingConfig(), 1, 16)
    inputs = {name: tensor.to(DEVICE) for name, tensor in make_inputs(mixer, 0, 1).items()}
    output = self_modifying(*split(inputs), mixer.spec, backend="triton")
    assert output.y.shape == (1, 1, 0, 16)
    assert torch.equal(output.state.memory.running.w_in, inputs["running/w_in"])


def test_a_loss_of_outputs_alone_has_the_loops_gradients():
    mixer = make_mixer(SelfModifyingConfig(chunk_size=16, adaptive=("eta",)), 1, 16)
    inputs = {n: x.to(DEVICE).requires_grad_() for n, x in make_inputs(mixer, 5, 1).items()}
    given = {"allow_unused": True, "materialize_grads": True}
    grads = [torch.autograd.grad(run(mixer, inputs).y.sum(), list(inputs.values()), **given) for run in (fused, looped)]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
