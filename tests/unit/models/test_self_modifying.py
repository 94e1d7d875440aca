"""The self-modifying mixer against its equations, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.init import initialize
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.self_modifying import chunked
from hopescale.parallel.mesh import Mesh
from tests.support.naive_mixer import SWITCHES, naive_mixer

WIDTH, HEADS, DIM, BATCH = 12, 2, 6, 2


def fresh_mixer(config: SelfModifyingConfig, dim: int, seed: int = 0) -> SelfModifying:
    model = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=dim, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone())
    initialize(mixer, seed, Mesh.alone())
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
        found = state.named()
        for name, tensor in last.named().items():
            assert_equal_up_to_rounding(found[name], tensor)


@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes", "boundary", "inclusive", "resets"])
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


def test_memories_of_a_piece_know_nothing_of_the_one_before():
    mixer = make_mixer(SelfModifyingConfig(chunk_size=4, reset_every=8, conv_width=3))
    x = torch.randn(20, BATCH, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    changed = x.clone()
    changed[6] += 1.0
    difference = (mixer(changed)[0] - mixer(x)[0]).abs().amax((1, 2))
    assert difference[7] > 1e-3
    assert difference[8] > 1e-3, "the convolution goes on"
    assert difference[16:].max() == 0


@pytest.mark.parametrize("memory", ["mlp", "linear"])
@pytest.mark.parametrize("dim", [16, 64])
def test_fresh_memory_keeps_more_than_half_its_norm_after_64_tokens(memory: str, dim: int):
    mixer = fresh_mixer(SelfModifyingConfig(memory=memory), dim)
    x = torch.randn(64, BATCH, WIDTH, generator=torch.Generator().manual_seed(9))
    start = mixer.initial_state(BATCH).named()
    end = mixer(x)[1].named()
    for name in start:
        if "/running/" in name:
            assert end[name].norm() > 0.5 * start[name].norm(), name


@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes"])
def test_state_stays_bounded_over_a_long_repetitive_sequence(switch: str):
    mixer = fresh_mixer(replace(SelfModifyingConfig(chunk_size=4), **SWITCHES[switch]), DIM)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4)).repeat(2000, 1, 1))
    assert max(float(tensor.abs().max()) for tensor in state.named().values()) < 50


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("switch", ["default", "linear", "two chunk sizes"])
def test_a_key_that_comes_back_in_every_chunk_lets_no_gradient_explode(switch: str, seed: int):
    """Inner gradients of a chunk are taken at its boundary; an overshoot would grow from chunk to chunk.

    Rates begin at 0.1, the default; where they begin at 0.5 gradients of most linear memories do explode.
    """
    config = replace(SelfModifyingConfig(chunk_size=16), **SWITCHES[switch])
    config = replace(config, chunk_size=16, projection_chunk_size=32 if config.projection_chunk_size else None)
    mixer = fresh_mixer(config, 16, seed)
    sizes = {}
    for chunks in (4, 40):
        x = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(4)).repeat(16 * chunks, 1, 1)
        y, _ = mixer(x.requires_grad_())
        (gradient,) = torch.autograd.grad(y[-16:].square().sum(), x)
        sizes[chunks] = float(gradient.norm())
    assert sizes[40] < 3 * sizes[4]


def test_the_chunk_loop_is_traced_without_a_break(monkeypatch: pytest.MonkeyPatch):
    mixer = make_mixer(SelfModifyingConfig(chunk_size=4))
    x = torch.randn(23, BATCH, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = mixer(x)[0]
    traced = []

    def compile_eagerly(function: Callable, **how: object) -> Callable:
        assert how == {"fullgraph": True, "dynamic": False}
        traced.append(function)
        return original(function, **how, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    chunked._compiled.cache_clear()
    mixer.computed["compiled"] = True
    assert_equal_up_to_rounding(mixer(x)[0], expected)
    chunked._compiled.cache_clear()
    assert len(traced) == 1


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_the_backend_reaches_what_computes(memory: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = SelfModifyingConfig(memory=memory, objective="dot", adaptive=())
    model = ModelConfig(d_model=32, num_heads=2, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.1, mesh=Mesh.alone(), backend="triton")
    with pytest.raises(ValueError, match="backend is 'triton', but"):
        mixer(torch.randn(1, 3, 32), None)
