"""The self-modifying mixer against its equations as a loop over sequences, heads and tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import SelfModifyingConfig
from hopescale.models.init import initialize
from hopescale.models.self_modifying import SelfModifying
from hopescale.parallel.mesh import Mesh

WIDTH, HEADS, DIM, BATCH = 12, 2, 6, 2

SWITCHES = {
    "default": {},
    "linear": {"memory": "linear"},
    "no momentum": {"momentum": False},
    "gradient descent": {"inner_rule": "gd"},
    "linear gradient descent": {"memory": "linear", "inner_rule": "gd", "momentum": False},
    "dot": {"objective": "dot"},
    "linear dot": {"memory": "linear", "objective": "dot"},
    "no retention": {"retention": False, "adaptive": ("k", "v", "eta")},
    "inclusive": {"read": "inclusive"},
    "boundary": {"read": "boundary"},
    "linear boundary": {"read": "boundary", "memory": "linear"},
    "static": {"adaptive": ()},
    "only gates": {"adaptive": ("eta", "alpha")},
    "only k": {"adaptive": ("k",)},
    "one gate": {"adaptive": ("eta",)},
    "query memory": {"query": "memory"},
    "value targets": {"adaptive": (), "targets": "value"},
    "linear value targets": {"adaptive": (), "targets": "value", "memory": "linear"},
    "TTT-Linear": {
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "inner_rule": "gd",
        "momentum": False,
        "retention": False,
    },
    "TTT-MLP": {"adaptive": (), "targets": "value", "inner_rule": "gd", "momentum": False, "retention": False},
    "Titans": {"adaptive": (), "targets": "value", "inner_rule": "gd"},
    "error cap": {"error_cap": 0.3},
    "hidden width": {"memory_dim": 10},
    "large eta": {"eta_max": 2.0, "eta_init": 0.4},
    "gate": {"gate": True},
    "no conv": {"conv_width": None},
    "two chunk sizes": {"projection_chunk_size": 8},
    "two chunk sizes, linear": {"projection_chunk_size": 8, "memory": "linear"},
    "two chunk sizes, one gate": {"projection_chunk_size": 8, "adaptive": ("eta",)},
    "two chunk sizes, query memory": {"projection_chunk_size": 8, "query": "memory", "adaptive": ()},
    "token chunks": {"chunk_size": 1},
}


def fresh_mixer(config: SelfModifyingConfig, dim: int) -> SelfModifying:
    mixer = SelfModifying(WIDTH, HEADS, dim, config, norm_eps=1e-6, out_std=0.3, mesh=Mesh.alone())
    initialize(mixer, 0, Mesh.alone())
    return mixer


def make_mixer(config: SelfModifyingConfig) -> SelfModifying:
    mixer = fresh_mixer(config, DIM)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            # Away from the structured start, so that every term of the equations matters.
            parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return mixer.double()


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-7, atol=1e-9)


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() + 1e-6)


class Memory:
    """One memory of one head in one sequence: its weights, their momentum, and those of the last boundary."""

    def __init__(self, initial: torch.nn.Module, head: int):
        self.weights = {name: parameter[head] for name, parameter in initial.named_parameters()}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.boundary = self.weights

    def answer(self, weights: dict[str, Tensor], z: Tensor) -> Tensor:
        if "w" in weights:
            return weights["w"] @ z
        y = weights["w1"] @ torch.nn.functional.silu(weights["w2"] @ z)
        return z + y if len(y) == len(z) else y

    def write(self, config: SelfModifyingConfig, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor) -> None:
        """One step of the inner rule; the inner loss's gradient at the boundary by automatic differentiation."""
        inner = {name: weight.clone() for name, weight in self.boundary.items()}
        answer = self.answer(inner, k)
        target = self.answer(self.boundary, v) if config.targets == "self" else v
        error = answer - target if config.objective == "l2" else -target
        if config.error_cap is not None:
            error = error * torch.clamp(config.error_cap / torch.sqrt((error * error).sum() + 1e-12), max=1.0)
        gradients = torch.autograd.grad(answer, list(inner.values()), grad_outputs=error, create_graph=True)
        hidden = torch.nn.functional.silu(self.boundary["w2"] @ k) if "w2" in inner else None
        after = {}
        for name, gradient in zip(inner, gradients, strict=True):
            key = hidden / torch.sqrt((hidden * hidden).sum() + 1e-2) if name == "w1" else k
            erase = eta * torch.outer(key, key) if config.inner_rule == "dgd" else 0.0
            self.momentum[name] = mu * self.momentum[name] - (1 - mu) * eta * gradient
            keep = alpha * torch.eye(len(key), dtype=key.dtype) - erase
            after[name] = self.weights[name] @ keep + self.momentum[name]
        self.weights = after


def naive_head(mixer: SelfModifying, head: int, streams: dict[str, Tensor]) -> Tensor:
    """Run one head over one sequence, token by token: streams `[T, D]` to outputs `[T, D]`."""
    config = mixer.config
    memories = {
        name: Memory(getattr(bank, name), head) for bank in mixer.banks.values() for name in bank.wide + bank.narrow
    }

    def gate(name: str, x: Tensor) -> Tensor:
        module = mixer.gates[name]
        logit = memories[name].answer(memories[name].boundary, x)[0] if name in memories else module.weight[head] @ x
        return torch.sigmoid(logit + module.bias[head])

    def stream(name: str, x: Tensor) -> Tensor:
        return memories[name].answer(memories[name].boundary, unit(x)) if name in memories else x

    outputs = []
    for t in range(len(streams["k"])):
        for name, memory in memories.items():
            if t % mixer.chunks[0 if name == "mem" else 1] == 0:
                memory.boundary = memory.weights
        k, q, v = (stream(name, streams[name][t]) for name in ("k", "q", "v"))
        k, q, v = unit(k), unit(q), unit(v) if config.targets == "self" else v
        x = unit(streams["k"][t])
        eta = config.eta_max * gate("eta", x)
        alpha = gate("alpha", x) if config.retention else torch.ones((), dtype=x.dtype)
        mu = gate("mu", x) if config.momentum else torch.zeros((), dtype=x.dtype)
        main = memories["mem"]
        before = main.weights
        for memory in memories.values():
            memory.write(config, k, v, eta, alpha, mu)
        source = {"prefix": before, "inclusive": main.weights, "boundary": main.boundary}[config.read]
        outputs.append(main.answer(source, q))
    return torch.stack(outputs)


def naive_mixer(mixer: SelfModifying, x: Tensor) -> Tensor:
    """The whole layer, written out: projection, convolution, heads, norm, gate, projection."""
    tokens, batch = x.shape[:2]
    slices = 3 + mixer.config.gate
    weight = mixer.in_proj.weight.view(HEADS, slices, DIM, WIDTH)
    mixed = torch.einsum("tbn,hsdn->tbhsd", x, weight)
    if mixer.conv is not None:
        filters = mixer.conv["weight"].view(HEADS, 3, DIM, -1)
        width = filters.shape[-1]
        rows = []
        for t in range(tokens):
            past = [t - width + 1 + i for i in range(width)]
            taps = [mixed[s, :, :, :3] * filters[..., i] for i, s in enumerate(past) if s >= 0]
            rows.append(torch.nn.functional.silu(sum(taps)))
        convolved = torch.stack(rows)
    else:
        convolved = mixed[:, :, :, :3]
    heads = []
    for b in range(batch):
        for h in range(HEADS):
            streams = {name: convolved[:, b, h, i] for i, name in enumerate(("k", "v", "q"))}
            y = naive_head(mixer, h, streams)
            y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * mixer.norm.weight[h]
            if mixer.config.gate:
                y = y * torch.nn.functional.silu(mixed[:, b, h, 3])
            heads.append(y)
    result = torch.stack(heads).view(batch, HEADS, tokens, DIM).permute(2, 0, 1, 3)
    return result.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_mixer_equals_its_equations(switch: str, tokens: int):
    config = replace(SelfModifyingConfig(chunk_size=4), **SWITCHES[switch])
    mixer = make_mixer(config)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, BATCH, WIDTH, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, BATCH, WIDTH, generator=g, dtype=torch.float64)
    inputs = [x, *mixer.parameters()]

    results = []
    for function in (lambda: mixer(x)[0], lambda: naive_mixer(mixer, x)):
        y = function()
        gradients = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append([y, *gradients])
    for actual, expected in zip(*results, strict=True):
        assert_equal_up_to_rounding(actual, expected)


@pytest.mark.parametrize("switch", SWITCHES)
def test_split_sequence_equals_one_pass(switch: str):
    mixer = make_mixer(replace(SelfModifyingConfig(chunk_size=4), **SWITCHES[switch]))
    x = torch.randn(23, BATCH, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole, last = mixer(x)
    for cuts in ([7], [4, 8, 16], [1, 2, 3, 22]):
        state, parts = mixer.initial_state(BATCH), []
        for part in torch.tensor_split(x, cuts):
            y, state = mixer(part, state)
            parts.append(y)
        assert_equal_up_to_rounding(torch.cat(parts), whole)
        assert state.position == last.position == 23
        for name, tensor in last.tensors.items():
            assert_equal_up_to_rounding(state.tensors[name], tensor)


@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes", "boundary", "inclusive"])
def test_later_tokens_change_no_earlier_output(switch: str):
    mixer = make_mixer(replace(SelfModifyingConfig(chunk_size=4), **SWITCHES[switch]))
    x = torch.randn(20, BATCH, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    changed = x.clone()
    changed[11:] += 1.0
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(after[:11], before[:11], rtol=0, atol=1e-12)
    assert (after[11:] - before[11:]).abs().max() > 1e-3


def test_sequences_of_a_batch_are_independent():
    mixer = make_mixer(SelfModifyingConfig(chunk_size=4))
    x = torch.randn(20, BATCH, WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    changed = x.clone()
    changed[:, 1] += 1.0
    torch.testing.assert_close(mixer(changed)[0][:, 0], mixer(x)[0][:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", ["mlp", "linear"])
@pytest.mark.parametrize("dim", [16, 64])
def test_fresh_memory_keeps_more_than_half_its_norm_after_64_tokens(memory: str, dim: int):
    mixer = fresh_mixer(SelfModifyingConfig(memory=memory), dim)
    x = torch.randn(64, BATCH, WIDTH, generator=torch.Generator().manual_seed(9))
    start = mixer.initial_state(BATCH)
    _, end = mixer(x)
    for name in start.tensors:
        if "/running/" in name:
            assert end.tensors[name].norm() > 0.5 * start.tensors[name].norm(), name


@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes"])
def test_state_stays_bounded_over_a_long_repetitive_sequence(switch: str):
    mixer = fresh_mixer(replace(SelfModifyingConfig(chunk_size=4), **SWITCHES[switch]), DIM)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4)).repeat(2000, 1, 1))
    assert max(float(tensor.abs().max()) for tensor in state.tensors.values()) < 50


@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes"])
def test_a_key_that_comes_back_in_every_chunk_lets_no_gradient_explode(switch: str):
    """Inner gradients of a chunk are taken at its boundary; an overshoot would grow from chunk to chunk."""
    config = replace(SelfModifyingConfig(chunk_size=16, eta_init=0.5), **SWITCHES[switch])
    config = replace(config, chunk_size=16, projection_chunk_size=32 if config.projection_chunk_size else None)
    mixer = fresh_mixer(config, 16)
    sizes = {}
    for chunks in (4, 40):
        x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4)).repeat(16 * chunks, 1, 1)
        y, _ = mixer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y[-16:].square().sum(), x)
        sizes[chunks] = float(gradient.norm())
    assert sizes[40] < 3 * sizes[4]


def test_the_chunk_loop_is_traced_without_a_break(monkeypatch: pytest.MonkeyPatch):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=4))
    x = torch.randn(9, BATCH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = mixer(x)[0]
    monkeypatch.setattr(mixer, "_step", torch.compile(mixer._advance, fullgraph=True, dynamic=False, backend="eager"))
    assert_equal_up_to_rounding(mixer(x)[0], expected)


def test_the_backend_reaches_the_delta_rule(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = SelfModifyingConfig(memory="linear", objective="dot", adaptive=())
    mixer = SelfModifying(32, 2, 16, config, norm_eps=1e-6, out_std=0.1, mesh=Mesh.alone(), backend="triton")
    with pytest.raises(ValueError, match="backend is 'triton', but"):
        mixer(torch.randn(1, 3, 32), None)
