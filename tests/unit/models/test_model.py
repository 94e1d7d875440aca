"""The whole model: where its loss starts, what its loss reaches, what it carries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    MixerConfig,
    ModelConfig,
    SelfModifyingConfig,
)
from hopescale.cost.params import count_params
from hopescale.models import Model, level_of
from hopescale.parallel.layers import cross_entropy_sum
from tests.support import models

BASE = replace(models.BASE, num_heads=2, mixers={"hope": SelfModifyingConfig(chunk_size=16)})
VARIANTS = {
    "hope": {},
    "hope linear": {"mixers": {"hope": SelfModifyingConfig(memory="linear", chunk_size=16)}},
    "hope gate, query memory": {"mixers": {"hope": SelfModifyingConfig(gate=True, query="memory", chunk_size=16)}},
    "hope static": {"mixers": {"hope": SelfModifyingConfig(adaptive=(), chunk_size=16)}},
    "hope two chunk sizes": {"mixers": {"hope": SelfModifyingConfig(chunk_size=8, projection_chunk_size=16)}},
    "attention": {"mixers": {"attention": AttentionConfig(qk_norm=True)}},
    "levels over depth": {
        "num_layers": 5,
        "cms": CmsConfig(placement="depth", levels={"fast": LevelConfig(9), "slow": LevelConfig(9, 4)}),
    },
    "grouped-query attention": {
        "mixers": {"attention": AttentionConfig(num_kv_heads=1, qkv_bias=True)},
    },
    "independent": {"cms": CmsConfig("independent", models.LEVELS)},
    "untied": {"tie_embeddings": False},
}


def make_config(variant: str) -> ModelConfig:
    return replace(BASE, **VARIANTS[variant])


def make_tokens(batch: int, tokens: int, vocab: int = 200) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_reaches_every_parameter(variant: str):
    model = Model(make_config(variant))
    tokens = make_tokens(2, 50)
    cross_entropy_sum(model(tokens[:, :-1])[0], tokens[:, 1:], model.mesh).backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unreached


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_the_cost_model_counts(variant: str):
    config = make_config(variant)
    assert sum(p.numel() for p in Model(config).parameters()) == count_params(config)["total"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequence_split_anywhere_equals_one_pass(variant: str):
    model = Model(make_config(variant))
    tokens = make_tokens(2, 45)
    with torch.no_grad():
        whole, _ = model(tokens)
        for cuts in ([1], [16, 32], [7, 8, 9, 44]):
            state, parts = model.initial_state(2), []
            for part in torch.tensor_split(tokens, cuts, dim=1):
                logits, state = model(part, state)
                parts.append(logits)
            torch.testing.assert_close(torch.cat(parts, 1)[..., :200], whole[..., :200], rtol=1e-4, atol=1e-5)
            assert state.position == 45


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("mixer", [SelfModifyingConfig(), AttentionConfig()], ids=lambda mixer: mixer.kind)
@pytest.mark.parametrize(("width", "std"), [(32, 0.02), (512, 0.02), (64, 0.5)])
def test_loss_starts_at_the_logarithm_of_the_vocabulary(mixer: MixerConfig, width: int, std: float, tie: bool):
    config = replace(BASE, mixers={"mixer": mixer}, vocab_size=1000, d_model=width, tie_embeddings=tie, init_std=std)
    tokens = make_tokens(2, 200, 1000)
    model = Model(config)
    with torch.no_grad():
        loss = cross_entropy_sum(model(tokens)[0], tokens.roll(-1, 1), model.mesh) / tokens.numel()
    assert abs(loss - math.log(1000)) < 0.1


def test_padding_of_the_vocabulary_is_never_predicted():
    model = Model(BASE)
    logits, _ = model(make_tokens(1, 5))
    assert logits.shape[-1] == 256
    assert torch.isneginf(logits[..., 200:]).all()
    assert torch.isfinite(logits[..., :200]).all()


def test_last_only_gives_the_last_logits():
    model, tokens = Model(BASE), make_tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, last_only=True)[0], model(tokens)[0][:, -1:])


def test_initial_weights_depend_on_seed_and_name_only():
    small, deep = Model(BASE, seed=3), Model(replace(BASE, num_layers=3), seed=3)
    torch.rand(7)
    again, other = Model(BASE, seed=3), Model(BASE, seed=4)
    weights = dict(small.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name])
    assert torch.equal(deep.blocks["1"].mixer.in_proj.weight, small.blocks["1"].mixer.in_proj.weight)
    assert not torch.equal(small.blocks["0"].mixer.in_proj.weight, small.blocks["1"].mixer.in_proj.weight)
    assert not torch.equal(other.embedding.weight, small.embedding.weight)


def test_low_precision_leaves_gates_norms_and_memories_in_float32():
    model = Model(BASE).to_precision(torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["blocks.0.mixer.in_proj.weight"] == kinds["embedding.weight"] == torch.bfloat16
    kept = ("norm", ".gates.", ".banks.", ".conv.")
    assert all((kind == torch.float32) == any(k in name for k in kept) for name, kind in kinds.items())
    tokens = make_tokens(2, 40)
    logits, state = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for n, t in state.layers[0].named().items() if n != "conv_tail")
    with torch.no_grad():
        reference = Model(BASE)(tokens)[0][..., :200]
    torch.testing.assert_close(logits[..., :200].float(), reference, rtol=0, atol=0.1)


def test_probe_reports_the_gates_it_starts_with():
    probe: dict[str, torch.Tensor] = {}
    Model(BASE)(make_tokens(2, 40), probe=probe)
    assert set(probe) == {
        f"memory/{i}/{s}" for i in (0, 1) for s in ("eta_mean", "alpha_mean", "surprise", "state_norm", "tokens")
    }
    assert abs(float(probe["memory/0/eta_mean"]) - BASE.mixers["hope"].eta_init) < 0.02
    assert abs(float(probe["memory/0/alpha_mean"]) - BASE.mixers["hope"].alpha_init) < 0.002


def test_level_of_a_parameter():
    names = [name for name, _ in Model(BASE).named_parameters()]
    assert {level_of(name) for name in names} == {None, "fast", "slow"}
    assert level_of("blocks.1.cms.levels.slow.down.weight") == "slow"
    assert level_of("blocks.1.mixer.out_proj.weight") is None
