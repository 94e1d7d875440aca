"""Chunks as one operation in C++ against the equations of the mixer as a loop, and against the chunk loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.init import initialize
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.cpp import build
from hopescale.ops.self_modifying import chunked
from hopescale.parallel.mesh import Mesh
from tests.support.naive_mixer import SWITCHES, naive_mixer

WIDTH, HEADS, DIM, BATCH = 24, 2, 16, 2
OWN_WIDTHS = {"hidden width": {"memory_dim": 32}}
FUSED = {name: switch | OWN_WIDTHS.get(name, {}) for name, switch in SWITCHES.items() if "two chunk" not in name}

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make_mixer(switch: str, chunk_size: int, backend: str) -> SelfModifying:
    config = replace(SelfModifyingConfig(chunk_size=chunk_size), **FUSED[switch])
    model = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=DIM, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend=backend)
    initialize(mixer, 0, Mesh.alone())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return mixer


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


def distance(x: Tensor, exact: Tensor) -> float:
    """Return the largest error, as a part of the largest entry."""
    return float((x.detach().double() - exact.detach()).abs().max() / (exact.detach().abs().max() + 1e-9))


@pytest.mark.parametrize("switch", FUSED)
@pytest.mark.parametrize("tokens", [1, 19])
def test_fused_mixer_equals_its_equations(switch: str, tokens: int):
    fused, naive = make_mixer(switch, 4, "cpp"), make_mixer(switch, 4, "torch").double()
    g = torch.Generator().manual_seed(5)
    x, weights = torch.randn(2, tokens, BATCH, WIDTH, generator=g)
    results = []
    for mixer, run in ((fused, lambda x: fused(x)[0]), (naive, lambda x: naive_mixer(naive, x))):
        given = x.to(mixer.in_proj.weight.dtype).requires_grad_()
        y = run(given)
        inputs = [given, *mixer.parameters()]
        grads = torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append([y, *grads])
    for actual, expected in zip(*results, strict=True):
        # `1 - alpha` has five digits in float32 where alpha starts, at 0.995; torch's operations are as far off.
        assert_close(actual, expected, 1e-4)


def outputs(mixer: SelfModifying, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Run from a state in use: outputs, what is carried on and what is probed; gradients through all but the last.

    Memories that store static values never look at the weights that a chunk began with; the delta rule returns others.
    """
    g = torch.Generator().manual_seed(6)
    state = mixer.initial_state(BATCH)
    first = state.named()
    names = [name for name in first if "/boundary/" not in name]
    leaves = [
        (first[name] + 0.1 * torch.randn(first[name].shape, generator=g)).detach().requires_grad_() for name in names
    ]
    tensors = dict(zip(names, leaves, strict=True))
    tensors |= {name: tensors[name.replace("boundary", "running")] for name in first if "/boundary/" in name}
    x = torch.randn(tokens, BATCH, WIDTH, generator=g).to(mixer.in_proj.weight.dtype).requires_grad_()
    probe: dict[str, Tensor] = {}
    y, after = mixer(x, state.with_named(tensors), probe=probe)
    looks_back = mixer.spec.is_sequential
    results = [y, *(x for name, x in sorted(after.named().items()) if looks_back or "/boundary/" not in name)]
    loss = sum((one * torch.randn(one.shape, generator=g)).sum() for one in results)
    inputs = [x, *leaves, *mixer.parameters()]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [*results, *probe.values()], list(grads)


@pytest.mark.parametrize("switch", FUSED)
@pytest.mark.parametrize(("chunk_size", "tokens"), [(20, 45), (16, 32), (1_000_000, 5)])
def test_states_and_their_gradients_equal_the_chunk_loops(switch: str, chunk_size: int, tokens: int):
    chunk_size = FUSED[switch].get("chunk_size", chunk_size)
    mixers = [make_mixer(switch, chunk_size, backend) for backend in ("cpp", "torch", "torch")]
    results = [outputs(mixer, tokens) for mixer in (*mixers[:2], mixers[2].double())]
    for part in range(2):
        fused, chunk_loop, exact = (result[part] for result in results)
        # Rates up to 2 turn what keys read around instead of erasing it, and multiply the rounding of either way: over
        # eight draws both were 5e-6 to 2e-4 from float64, now the one and now the other farther, up to seven times.
        rounding = max(map(distance, chunk_loop, exact))
        for one, other in zip(fused, exact, strict=True):
            assert_close(one, other, max(3e-5, 10 * rounding))


def test_two_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    """Of the operation: what is torch's runs in one thread, as its products may cut their sums by threads."""
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(outputs(make_mixer("default", 16, "cpp"), 45))
    for part in range(2):
        assert all(torch.equal(*pair) for pair in zip(results[0][part], results[1][part], strict=True))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the chunks were run one by one")


def run_without_loop(monkeypatch: pytest.MonkeyPatch, backend: str, **changes: object) -> Callable[[], None]:
    config = replace(SelfModifyingConfig(chunk_size=4), **changes)
    model = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=DIM, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend=backend)
    monkeypatch.setattr(chunked, "scan", refuse)
    return lambda: mixer(torch.randn(9, BATCH, WIDTH))


def test_auto_takes_the_operation_and_torch_the_loop(monkeypatch: pytest.MonkeyPatch):
    run_without_loop(monkeypatch, "auto")()
    with pytest.raises(AssertionError, match="one by one"):
        run_without_loop(monkeypatch, "torch")()


def test_what_the_operation_cannot_do_is_left_to_the_loop_or_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError, match="one by one"):
        run_without_loop(monkeypatch, "auto", memory_dim=10)()
    with pytest.raises(ValueError, match="memories are 10 wide, not a multiple of 16"):
        run_without_loop(monkeypatch, "cpp", memory_dim=10)()
