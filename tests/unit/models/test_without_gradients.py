"""Passes without gradients in C++ against the equations of the mixer as a loop, and against the chunk loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import AttentionConfig, CmsConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.models import Model
from hopescale.models.init import initialize
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.cpp import build
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying import chunked, infer, mix, operation
from hopescale.parallel.mesh import Mesh
from tests.support.naive_mixer import SWITCHES, naive_mixer

WIDTH, HEADS, DIM, BATCH, CHUNK, TOKENS = 24, 2, 16, 2, 4, 19
CUTS = ([TOKENS], [1] * 6 + [4, 9], [3, 1, 15], [9, 10])
"""Calls that begin and end at boundaries and within chunks, and lie within one chunk, or one piece between resets."""
KINDS = SWITCHES | {"hidden width": {"memory_dim": 32}, "two banks in documents": {"projection_chunk_size": 8}}

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make_mixer(kind: str, backend: str, **changes: object) -> SelfModifying:
    config = replace(SelfModifyingConfig(chunk_size=CHUNK), **KINDS[kind] | changes)
    model = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=DIM, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend=backend)
    initialize(mixer, 0, Mesh.alone())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return mixer


def make_inputs(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, BATCH, WIDTH, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run_in(cuts: Sequence[int], mixer: SelfModifying, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run calls of so many tokens one after the other: outputs, and the state after them."""
    outputs, state = [], None
    for part in x.split(list(cuts)):
        y, state = mixer(part, state)
        outputs.append(y)
    return torch.cat(outputs), state.named()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor], mixer: SelfModifying) -> None:
    """Compare states; memories that store static values never look at the weights that a chunk began with."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if mixer.spec.is_sequential or "/boundary/" not in name:
            assert_close(actual[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_without_gradients_equals_its_equations_however_it_is_cut(kind: str):
    lean, exact, x = make_mixer(kind, "cpp"), make_mixer(kind, "torch").double(), make_inputs()
    expected = naive_mixer(exact, x.double()).detach()
    _, state = run_in([TOKENS], exact, x.double())
    for cuts in CUTS:
        y, after = run_in(cuts, lean, x)
        assert_close(y, expected, 1e-4)
        assert_same_state(after, state, lean)


@pytest.mark.parametrize("kind", ["default", "linear", "two banks in documents", "stored values", "resets", "no conv"])
@torch.no_grad()
def test_documents_begin_anew(kind: str):
    lean, exact, x = make_mixer(kind, "cpp"), make_mixer(kind, "torch").double(), make_inputs()
    ids = torch.tensor([[0] * 5 + [1] + [2] * 13, [0] * 12 + [3] * 7])
    results, probes = [], []
    for mixer, given in ((lean, x), (exact, x.double())):
        probes.append({})
        y, state = mixer(given, documents=Documents.of(ids), probe=probes[-1])
        results.append((y, state.named()))
    assert_close(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1], lean)
    for name, value in probes[1].items():
        assert_close(probes[0][name], value)


@pytest.mark.parametrize("kind", ["default", "two chunk sizes", "resets"])
def test_a_probe_changes_nothing(kind: str):
    mixer, x, probe = make_mixer(kind, "cpp"), make_inputs(), {}
    with torch.no_grad():
        y, state = mixer(x[:7])
        assert_close(mixer(x[7:], state, probe=probe)[0], mixer(x[7:], state)[0], 1e-6)
    assert probe.keys() == {"eta_mean", "alpha_mean", "surprise", "state_norm", "tokens"}


def test_a_given_state_is_not_changed():
    mixer, x = make_mixer("default", "cpp"), make_inputs()
    with torch.no_grad():
        _, state = mixer(x[:7])
        before = {name: tensor.clone() for name, tensor in state.named().items()}
        first, _ = mixer(x[7:8], state)
        again, _ = mixer(x[7:8], state)
    assert torch.equal(first, again)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.named().items())


def test_two_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    mixer, x, results = make_mixer("two chunk sizes", "cpp"), make_inputs(), []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(run_in([5, 14], mixer, x))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], tensor) for name, tensor in results[1][1].items())


@pytest.mark.parametrize("fused", [True, False])
def test_no_chunk_is_run_by_the_loop(fused: bool, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the memories are run by something else")

    monkeypatch.setattr(chunked, "scan", refuse)
    monkeypatch.setattr(operation, "self_modifying_cpp", refuse)
    if fused:
        monkeypatch.setattr(operation, "self_modifying_infer", refuse)
    mixer = make_mixer("two chunk sizes", "auto", chunk_size=CHUNK)
    with torch.no_grad():
        y, state = mixer(make_inputs(7), probe=None if fused else {})
        mixer(make_inputs(2), state, probe=None if fused else {})
    with pytest.raises(AssertionError, match="something else"):
        mixer(make_inputs(7))


def test_a_system_without_memory_is_named(monkeypatch: pytest.MonkeyPatch):
    """The number that decides how much is asked for stands for one that no machine has."""
    mixer, banks_of = make_mixer("default", "cpp"), mix.banks_of

    def endless(*arguments: object):
        banks = infer.CBanks.from_buffer_copy(banks_of(*arguments))
        banks.specs[0].chunk = 1 << 24
        return banks

    monkeypatch.setattr(mix, "banks_of", endless)
    with torch.no_grad(), pytest.raises(MemoryError, match="width 16 in chunks of 16777216 tokens"):
        mixer(make_inputs(3))


@pytest.mark.parametrize("mixer", [{}, {"projection_chunk_size": 8, "memory": "linear"}, {"reset_every": 8}])
def test_generation_equals_the_forward_pass_of_training(mixer: dict[str, object]):
    hope = SelfModifyingConfig(chunk_size=CHUNK, **mixer)
    levels = {"fast": LevelConfig(d_ff=16), "slow": LevelConfig(d_ff=16, update_every_steps=2)}
    sizes = {"vocab_size": 32, "d_model": 32, "num_layers": 2, "num_heads": 2, "tie_embeddings": False}
    model = Model(ModelConfig(**sizes, mixers={"hope": hope}, cms=CmsConfig(levels=levels)), seed=3).eval()
    tokens = torch.randint(32, (2, 23), generator=torch.Generator().manual_seed(1))
    expected, _ = model(tokens)
    assert expected.requires_grad
    with torch.no_grad():
        first, state = model(tokens[:, :6])
        rows = [first]
        for t in range(6, 23):
            row, state = model(tokens[:, t : t + 1], state)
            rows.append(row)
    assert_close(torch.cat(rows, dim=1)[..., :32], expected[..., :32])  # the rest is padding


@pytest.mark.parametrize("kind", ["self_modifying", "attention"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 64), (2, 2), (3, 50)])
def test_rows_of_a_batch_keep_to_themselves(kind: str, batch: int, tokens: int):
    """All of a model, levels included, gives what it gives with gradients."""
    mixer = SelfModifyingConfig(chunk_size=CHUNK) if kind == "self_modifying" else AttentionConfig()
    levels = {"fast": LevelConfig(d_ff=48), "slow": LevelConfig(d_ff=32, update_every_steps=2)}
    config = ModelConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=2, mixers={"hope": mixer}, cms=CmsConfig(levels=levels)
    )
    model = Model(config, seed=0)
    text = torch.randint(64, (batch, tokens), generator=torch.Generator().manual_seed(1))
    expected, _ = model(text)
    with torch.no_grad():
        actual, _ = model(text)
    assert_close(actual[..., :64], expected[..., :64])
