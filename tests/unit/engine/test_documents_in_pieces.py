"""Documents in sequences that are cut into pieces are those of whole sequences, wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import AttentionConfig, MixerConfig, TitansConfig, TttConfig
from hopescale.data.loader import Batch
from hopescale.engine import segments
from hopescale.engine.schedule import Loop, plain_backward
from hopescale.engine.segments import Segments
from hopescale.models import Model
from hopescale.models import attention as attention_module
from hopescale.models.statistics import MEANS
from hopescale.ops.cpp import build
from hopescale.ops.documents import Documents
from tests.support.models import BASE
from tests.unit.engine.test_segments import BATCH
from tests.unit.engine.test_segments import MIXERS as OTHERS

ROWS = [[5, 43, 9, 7], [16, 1, 15, 21, 11]]
"""Lengths of documents. Of four pieces of 16 tokens, the second document of the first row reaches into all, and ends
with the third. The second and fourth of the other row begin with a piece."""
IDS = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in ROWS], dtype=torch.int32)
PACKED = BATCH._replace(document_ids=IDS)
MIXERS: dict[str, MixerConfig] = OTHERS | {
    "ttt linear": TttConfig(chunk_size=8),
    "mag without a window": TitansConfig(composition="mag", persistent_tokens=3, chunk_size=8),
    "mal": TitansConfig(composition="mal", persistent_tokens=3, chunk_size=8, window=7),
    "mal without a window": TitansConfig(composition="mal", persistent_tokens=2, chunk_size=8),
    "wide window": AttentionConfig(window=40),
}
Run = tuple[Tensor, dict[str, Tensor]]
needs_cpp = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make_model(mixer: str, recompute: str = "chunks", head_dim: int | None = None) -> Model:
    settings = {"mixers": {"mixer": MIXERS[mixer]}, "within_documents": True, "head_dim": head_dim}
    return Model(replace(BASE, **settings), seed=2, recompute=recompute)


def run(mixer: str, count: int, recompute: str = "chunks", head_dim: int | None = None, batch: Batch = PACKED) -> Run:
    model = make_model(mixer, recompute, head_dim)
    loss = Segments(model.mesh, count).run(model, batch, None, None)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


whole: Callable[..., Run] = cache(lambda mixer, head_dim=None: run(mixer, 1, head_dim=head_dim))


def error(found: Run, expected: Run) -> float:
    """Return the largest relative error (of norms) of the loss and the gradients."""
    pairs = [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_of_pieces_are_those_of_the_whole(mixer: str, count: int):
    assert error(run(mixer, count), whole(mixer)) < 1e-5


@needs_cpp
@pytest.mark.parametrize("mixer", ["hope", "two banks", "resets and a far memory", "mac", "mal"])
def test_memories_that_are_run_in_one_operation(mixer: str):
    expected = whole(mixer, 16)
    assert error(run(mixer, 4, head_dim=16), expected) < 1e-5
    for count in (1, 4):
        model = make_model(mixer, head_dim=16)
        passes = Loop(model, plain_backward, Segments(model.mesh, count), torch.device("cpu"))
        torch.testing.assert_close(passes.evaluate([PACKED]), expected[0])


def test_keys_of_earlier_pieces_are_read_document_by_document(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_module, "LEAST_APART", 1)
    for mixer in ("attention", "wide window"):
        assert error(run(mixer, 4), whole(mixer)) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "reverse", "memory", "block"])
def test_whatever_is_computed_again(recompute: str):
    assert error(run("hope", 4, recompute), whole("hope")) < 1e-5


@pytest.mark.parametrize("mixer", ["hope", "linear attention", "ttt", "mac", "mag", "attention"])
@pytest.mark.parametrize("fault", ["is not passed", "gradient is dropped", "is not reset"])
def test_a_state_that_is_not_that_of_the_document_is_seen(mixer: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    real, find = segments._piece, Documents.of

    def faulty(model: Model, batch: Batch, handover: None, hidden: None, state: Any, probe: None) -> Any:
        if state is not None:
            change = torch.zeros_like if fault == "is not passed" else Tensor.detach
            layers = (layer.with_named({k: change(x) for k, x in layer.named().items()}) for layer in state.layers)
            state = state._replace(layers=tuple(layers))
        return real(model, batch, handover, hidden, state, probe)

    def going_on(ids: Tensor, device: Any = None, begun: Tensor | None = None) -> Documents:
        return find(ids, device, begun if begun is None or not begun.any() else begun.masked_fill(begun == 0, 16))

    if fault == "is not reset":
        monkeypatch.setattr(Documents, "of", going_on)
    else:
        monkeypatch.setattr(segments, "_piece", faulty)
    assert error(run(mixer, 2), whole(mixer)) > 1e-4


def test_documents_that_begin_with_a_piece_get_nothing_from_the_one_before():
    """Neither a state nor a way for gradients: each of two pieces is the same as a sequence of its own."""
    ids = torch.arange(64).div(32, rounding_mode="floor").int().expand(2, -1)
    apart = [Batch(*(part[:, half : half + 32] for part in BATCH[:2]), ids[:, :32]) for half in (0, 32)]
    for mixer in ("hope", "linear attention", "ttt", "mac", "mal", "attention"):
        first, second = (run(mixer, 1, batch=batch) for batch in apart)
        expected = {name: gradient + second[1][name] for name, gradient in first[1].items()}
        found = run(mixer, 2, batch=BATCH._replace(document_ids=ids))
        assert error(found, (first[0] + second[0], expected)) < 1e-5, mixer


@pytest.mark.parametrize("mixer", ["hope", "resets and a far memory", "two banks", "mac", "mag", "mal"])
def test_statistics_are_those_of_all_tokens(mixer: str):
    """Of these alone: not of persistent tokens, of what fills up rows, and of what the next piece runs again."""
    probes = []
    for count in (1, 4):
        probes.append({})
        model = make_model(mixer)
        Segments(model.mesh, count).run(model, PACKED, None, probes[-1])
    once, often = probes
    assert once.keys() == often.keys()
    for name in (f"memory/{layer}/{statistic}" for layer in (0, 1) for statistic in MEANS):
        torch.testing.assert_close(often[name], once[name], rtol=1e-5, atol=0)
    for layer in (0, 1):
        values = [probe[f"memory/{layer}/tokens"].sort(dim=0).values for probe in probes]
        assert len(values[0]) == IDS.numel() * BASE.num_heads
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
        # Memories at the ends of pieces count too, but not, where documents end behind it, what lies behind a chunk.
        norms = [float(probe[f"memory/{layer}/state_norm"]) for probe in probes]
        assert norms[1] > 0.98 * norms[0]


def test_documents_that_go_on_need_the_state_of_the_piece_before():
    model, begun = make_model("hope"), torch.tensor([[0], [3]])
    with pytest.raises(ValueError, match="documents go on from an earlier piece, but there is no state of it"):
        model(BATCH.tokens, document_ids=IDS, begun=begun)
