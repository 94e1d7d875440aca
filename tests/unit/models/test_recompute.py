"""Activations computed again change no bit of the result, and are not kept."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hopescale.config.model_shape import mixer_of_block
from hopescale.config.schema import FarMemoryConfig, SelfModifyingConfig
from hopescale.models import Model, ModelState
from hopescale.ops.self_modifying import chunked
from hopescale.parallel.layers import cross_entropy_sum
from tests.support.models import BASE
from tests.support.split import VARIANTS

TOKENS = torch.randint(0, 200, (2, 49), generator=torch.Generator().manual_seed(1))
DOCUMENT_IDS = (torch.arange(48) > 9).long().expand(2, -1)


def forward(model: Model, state: ModelState | None = None, probe: dict | None = None) -> Tensor:
    logits, after = model(TOKENS[:, :-1], state, document_ids=None if state else DOCUMENT_IDS, probe=probe)
    loss = cross_entropy_sum(logits, TOKENS[:, 1:], model.mesh)
    return loss + sum(layer.square().sum() for part in after.layers for layer in part.named().values())


def kept_bytes(model: Model) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("recompute", ["memory", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_gradients_and_probes_are_the_same_bits(variant: str, recompute: str, carried: bool):
    config = replace(BASE, **VARIANTS[variant])
    results = []
    for mode in ("chunks", recompute):
        model, probe = Model(config, seed=2, recompute=mode), {}
        state = model(TOKENS[:, :11])[1] if carried else None
        loss = forward(model, state, probe)
        before = {name: (id(value), value.clone()) for name, value in probe.items()}
        loss.backward()
        assert probe.keys() == before.keys()
        assert all(id(probe[name]) == number and torch.equal(probe[name], x) for name, (number, x) in before.items())
        results.append((loss, before.keys(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, probed, gradients), (again, probed_again, gradients_again) = results
    assert torch.equal(loss, again)
    assert probed == probed_again
    blocks = [mixer_of_block(config, number) for number in range(config.num_layers)]
    statistics = {"self_modifying": 5, "titans": 5, "linear_attention": 2, "ttt": 1, "attention": 0}
    assert len(probed) == sum(statistics[mixer.kind] for mixer in blocks)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_computed_again_give_the_gradients_of_plain_differentiation(variant: str, carried: bool):
    config = replace(BASE, **VARIANTS[variant])
    results = []
    for mode in ("none", "chunks"):
        model = Model(config, seed=2, recompute=mode)
        loss = forward(model, model(TOKENS[:, :11])[1] if carried else None)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (again, gradients_again) = results
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        error = (gradients_again[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-6, name


SHORT = {"chunk_size": 2, "error_cap": 1.0}
REVERSED = {
    "hope": {},
    "no momentum": {"momentum": False},
    "linear": {"memory": "linear"},
    "linear, no momentum": {"memory": "linear", "momentum": False},
    "gradient descent": {"inner_rule": "gd", "eta_init": 0.01},
    "gradient descent, no momentum": {"inner_rule": "gd", "momentum": False, "eta_init": 0.01},
    "no retention": {"retention": False, "adaptive": ("k", "v", "eta"), "momentum": False},
    "little retention": {"alpha_init": 0.1, "momentum": False},
    "one memory, short hidden": {"adaptive": (), "targets": "value", "memory_dim": 4},
    "two banks": {"query": "memory", "projection_chunk_size": 4},
    "resets and a far memory": {"reset_every": 6, "far": FarMemoryConfig(4, 0.1)},
}


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("settings", REVERSED.values(), ids=REVERSED)
def test_states_found_again_are_the_same_bits(settings: dict, carried: bool):
    config = replace(BASE, num_heads=2, mixers={"hope": SelfModifyingConfig(**(SHORT | settings))})
    results, kept = {}, {}
    for mode in ("none", "chunks", "reverse"):
        model = Model(config, seed=2, recompute=mode, backend="torch")
        loss = forward(model, model(TOKENS[:, :11])[1] if carried else None)
        loss.backward()
        results[mode] = {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}
        kept[mode] = kept_bytes(model)
    assert kept["reverse"] < 0.95 * kept["chunks"]
    for name, gradient in results["reverse"].items():
        assert torch.equal(gradient, results["chunks"][name]), name
        plain = results["none"][name]
        assert (gradient - plain).abs().max() <= 1e-6 * plain.abs().max(), name


def test_less_is_kept():
    kept = {mode: kept_bytes(Model(BASE, recompute=mode)) for mode in ("none", "chunks", "memory", "block")}
    assert kept["chunks"] < kept["none"] / 2
    assert kept["memory"] < kept["chunks"]
    assert kept["block"] < kept["memory"] / 1.5


def test_nothing_is_kept_to_recompute_without_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.models.recompute.checkpoint", lambda *a, **k: pytest.fail("recomputing"))
    with torch.no_grad():
        forward(Model(BASE, recompute="block"))


@pytest.mark.parametrize("recompute", ["memory", "block"])
def test_a_mixer_that_is_computed_again_leaves_no_streams(recompute: str, monkeypatch: pytest.MonkeyPatch):
    real, seen = chunked.scan, []

    def noted(step, sizes, streams, carry, **options):
        seen.extend(weakref.ref(x) for x in tree_leaves((streams, carry)) if x is not None)
        return real(step, sizes, streams, carry, **options)

    monkeypatch.setattr(chunked, "scan", noted)
    loss = forward(Model(BASE, recompute=recompute))
    assert seen and all(tensor() is None for tensor in seen)
    loss.backward()
