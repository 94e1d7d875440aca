"""A sequence in pieces, with the states handed on, is the whole sequence: loss, every gradient, and less is kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import (
    AttentionConfig,
    FarMemoryConfig,
    LinearAttentionConfig,
    MixerConfig,
    SelfModifyingConfig,
    TitansConfig,
    TttConfig,
)
from hopescale.data.loader import Batch
from hopescale.engine import segments
from hopescale.engine.segments import Segments
from hopescale.models import LayerState, Model
from tests.support.models import BASE

GENERATOR = torch.Generator().manual_seed(1)
TOKENS, TARGETS = torch.randint(0, 200, (2, 2, 64), generator=GENERATOR)
BATCH = Batch(TOKENS, TARGETS.masked_fill(torch.arange(64) % 5 == 0, -100), torch.zeros_like(TOKENS))
MIXERS: dict[str, MixerConfig] = {
    "hope": SelfModifyingConfig(chunk_size=8),
    "two banks": SelfModifyingConfig(query="memory", gate=True, chunk_size=8, projection_chunk_size=16),
    "resets and a far memory": SelfModifyingConfig(chunk_size=4, reset_every=12, far=FarMemoryConfig(8, 0.1)),
    "static values": SelfModifyingConfig(memory="linear", adaptive=(), targets="value", chunk_size=8),
    "linear attention": LinearAttentionConfig(key_dim=6, chunk_size=8),
    "ttt": TttConfig(memory="mlp", chunk_size=4),
    "mac": TitansConfig(persistent_tokens=3, chunk_size=8),
    "mag": TitansConfig(composition="mag", persistent_tokens=3, chunk_size=8, window=7),
    "attention": AttentionConfig(qk_norm=True),
    "sliding window": AttentionConfig(window=5),
}
Run = tuple[Tensor, dict[str, Tensor], int]


def run(mixer: str, count: int, recompute: str = "chunks", probe: dict | None = None) -> Run:
    """Return loss, gradients, and the bytes kept for the backward pass, weights and states between pieces left out."""
    model = Model(replace(BASE, mixers={"mixer": MIXERS[mixer]}), seed=2, recompute=recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = Segments(model.mesh, count).run(model, BATCH, None, probe)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, sum(size for place, size in kept.items() if place not in own)


whole: Callable[..., Run] = cache(lambda mixer, recompute="chunks": run(mixer, 1, recompute))


def error(found: Run, expected: Run) -> float:
    """Return the largest relative error (of norms) of the loss and the gradients."""
    pairs = [(found[0], expected[0]), *((found[1][name], gradient) for name, gradient in expected[1].items())]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_are_the_whole(mixer: str, count: int):
    assert error(run(mixer, count), whole(mixer)) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "reverse", "memory", "block"])
def test_whatever_is_computed_again(recompute: str):
    assert error(run("hope", 4, recompute), whole("hope")) < 1e-5


@pytest.mark.parametrize("mixer", ["hope", "linear attention", "ttt", "sliding window"])
@pytest.mark.parametrize("fault", ["the state is not passed", "its gradient is dropped"])
def test_what_is_lost_between_pieces_is_seen(mixer: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    real = segments._piece

    def faulty(model: Model, batch: Batch, handover: None, hidden: None, state: Any, probe: None) -> Any:
        if state is not None and fault == "the state is not passed":
            fresh = model.initial_state(len(batch.tokens)).layers
            state = state._replace(
                layers=tuple(
                    LayerState(old.position, new.tensors) for old, new in zip(state.layers, fresh, strict=True)
                )
            )
        elif state is not None:
            layers = (layer.with_named({k: x.detach() for k, x in layer.named().items()}) for layer in state.layers)
            state = state._replace(layers=tuple(layers))
        return real(model, batch, handover, hidden, state, probe)

    monkeypatch.setattr(segments, "_piece", faulty)
    assert error(run(mixer, 2), whole(mixer)) > 1e-3


@pytest.mark.parametrize("recompute", ["chunks", "block"])
def test_the_activations_of_one_piece_are_kept(recompute: str):
    kept = {count: run("hope", count, recompute)[2] for count in (1, 2, 4)}
    assert kept[2] < 0.6 * kept[1] and kept[4] < 0.35 * kept[1]


def test_what_one_piece_computes_again_is_gone_when_the_next_does(monkeypatch: pytest.MonkeyPatch):
    """Counts the streams that are alive behind blocks, which what follows keeps for its gradient."""
    model, streams, most = Model(replace(BASE, num_layers=4), seed=2), [], []
    for block in model.blocks.values():
        block.register_forward_hook(lambda *call: streams.append(weakref.ref(call[2][0])))
        block.register_forward_hook(lambda *_: most.append(sum(stream() is not None for stream in streams)))
    Segments(model.mesh, 4).run(model, BATCH, None, None).backward()
    assert len(streams) == (4 + 3) * 4 and max(most) <= 4


def test_statistics_are_those_of_all_pieces():
    once, often = {}, {}
    run("hope", 1, probe=once)
    run("hope", 4, probe=often)
    assert once.keys() == often.keys()
    for name in ("eta_mean", "surprise"):
        torch.testing.assert_close(often[f"memory/1/{name}"], once[f"memory/1/{name}"])
    assert sorted(often["memory/0/tokens"][:, 0].tolist()) == pytest.approx(
        sorted(once["memory/0/tokens"][:, 0].tolist())
    )
    assert often["memory/0/state_norm"] >= once["memory/0/state_norm"]
