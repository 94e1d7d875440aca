"""The model that is shipped in exports against ours: whole, split, padded on either side, by grouped rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    FarMemoryConfig,
    LinearAttentionConfig,
    RopeScalingConfig,
    SelfModifyingConfig,
    TitansConfig,
    TransferConfig,
    TttConfig,
)
from hopescale.convert.hf_model.configuration_hope import HopeConfig
from hopescale.convert.hf_model.modeling_hope import HopeForCausalLM
from hopescale.models import Model
from tests.support.greedy import assert_same_text
from tests.support.split import BASE, LEVELS

TOKENS = 37
PADS = (0, 5, 16)
VARIANTS = {
    "hope": {},
    "two banks, linear": {
        "mixers": {
            "hope": SelfModifyingConfig(
                memory="linear",
                query="memory",
                gate=True,
                adaptive=("k", "eta"),
                chunk_size=8,
                projection_chunk_size=16,
            )
        }
    },
    "memories that start anew": {
        "mixers": {"hope": SelfModifyingConfig(chunk_size=4, projection_chunk_size=8, memory_dim=5, reset_every=8)}
    },
    "far memory": {"mixers": {"hope": SelfModifyingConfig(chunk_size=4, reset_every=8, far=FarMemoryConfig(12, 0.1))}},
    "all kinds": {
        "num_layers": 4,
        "mixers": {
            "hope": SelfModifyingConfig(chunk_size=4),
            "gdn": LinearAttentionConfig(key_dim=6, chunk_size=8),
            "local": AttentionConfig(window=6),
            "ttt": TttConfig(chunk_size=4),
        },
        "pattern": ("hope", "gdn", "local", "ttt"),
    },
    "two banks, MLP": {"mixers": {"hope": SelfModifyingConfig(chunk_size=4, projection_chunk_size=8, memory_dim=5)}},
    "no momentum, no erase, no convolution": {
        "mixers": {
            "hope": SelfModifyingConfig(
                read="inclusive", momentum=False, inner_rule="gd", chunk_size=8, error_cap=0.5, conv_width=None
            )
        }
    },
    "static maps": {
        "mixers": {
            "hope": SelfModifyingConfig(
                read="boundary",
                objective="dot",
                targets="value",
                adaptive=(),
                retention=False,
                chunk_size=4,
                eta_max=1.5,
                momentum_write="whole",
                normalize_writes=False,
            )
        }
    },
    "MAC": {"mixers": {"titans": TitansConfig(chunk_size=8, persistent_tokens=3)}},
    "MAG": {"mixers": {"titans": TitansConfig(composition="mag", window=7, chunk_size=8, persistent_tokens=3)}},
    "MAL": {
        "mixers": {
            "titans": TitansConfig(composition="mal", window=7, gate=True, chunk_size=8, persistent_tokens=3),
            "local": TitansConfig(composition="mal", conv_width=None, chunk_size=4, persistent_tokens=2),
        },
        "pattern": ("titans", "local"),
    },
    "Titans with heads of a width of their own": {
        "num_layers": 3,
        "head_dim": 12,
        "mixers": {
            name: TitansConfig(composition=name, chunk_size=8, persistent_tokens=3) for name in ("mac", "mag", "mal")
        },
        "pattern": ("mac", "mag", "mal"),
    },
    "attention": {"mixers": {"attention": AttentionConfig(qk_norm=True)}},
    "grouped-query attention": {
        "mixers": {
            "attention": AttentionConfig(num_kv_heads=2, qkv_bias=True, rope_scaling=RopeScalingConfig(first_context=8))
        },
    },
    "sliding window": {"mixers": {"attention": AttentionConfig(num_kv_heads=2, window=6)}},
    "linear rope scaling": {
        "mixers": {"attention": AttentionConfig(rope_scaling=RopeScalingConfig(kind="linear", factor=3.0))},
    },
    "independent levels": {"cms": CmsConfig("independent", LEVELS)},
    "levels over depth": {
        "num_layers": 3,
        "cms": CmsConfig(placement="depth", levels={name: replace(level, d_ff=16) for name, level in LEVELS.items()}),
    },
    "untied, no padding": {"tie_embeddings": False, "vocab_size": 256},
    "wider than its base": {"transfer": TransferConfig(16)},
    "attention, wider than its base": {
        "mixers": {"attention": AttentionConfig()},
        "transfer": TransferConfig(24, base_head_dim=4),
    },
}


def make_pair(variant: str) -> tuple[Model, HopeForCausalLM]:
    """Return our model, away from its initial weights, and theirs with the same."""
    config = replace(BASE, **VARIANTS[variant])
    ours, generator = Model(config, seed=1).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    theirs = HopeForCausalLM(HopeConfig(OmegaConf.to_container(OmegaConf.structured(config)))).eval()
    theirs.load_state_dict(dict(ours.named_parameters()))
    return ours, theirs


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request) -> tuple[Model, HopeForCausalLM]:
    return make_pair(request.param)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 200, (len(PADS), TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected(ours: Model, tokens: Tensor) -> Tensor:
    return ours(tokens)[0][..., : ours.config.vocab_size]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_whole_and_a_split_sequence_equal_ours(pair, tokens: Tensor):
    ours, theirs = pair
    whole = theirs(tokens)
    close(whole.logits, expected(ours, tokens))
    assert whole.past_key_values.get_seq_length() == TOKENS
    first = theirs(tokens[:, :13])
    rest = theirs(tokens[:, 13:], past_key_values=first.past_key_values, logits_to_keep=5)
    close(rest.logits, whole.logits[:, -5:])


@torch.no_grad()
def test_rows_padded_on_the_left_equal_rows_alone(pair, tokens: Tensor):
    """Rows stand at different places of their chunks; one row has a single token in the first call of 17."""
    ours, theirs = pair
    prefill = 17
    mask = torch.tensor([[0] * pad + [1] * (TOKENS - pad) for pad in PADS])
    padded = tokens * mask
    out = theirs(padded[:, :prefill], attention_mask=mask[:, :prefill])
    logits = [out.logits]
    for column in range(prefill, prefill + 9):
        columns = {"input_ids": padded[:, column : column + 1], "attention_mask": mask[:, : column + 1]}
        out = theirs(**columns, past_key_values=out.past_key_values)
        logits.append(out.logits)
    out = theirs(padded[:, prefill + 9 :], attention_mask=mask, past_key_values=out.past_key_values)
    logits = torch.cat([*logits, out.logits], dim=1)
    for row, pad in enumerate(PADS):
        close(logits[row, pad:], expected(ours, tokens[row : row + 1, pad:])[0])


@torch.no_grad()
def test_rows_padded_on_the_right_equal_rows_alone(pair, tokens: Tensor):
    ours, theirs = pair
    mask = torch.tensor([[1] * (TOKENS - pad) + [0] * pad for pad in PADS])
    logits = theirs(tokens * mask, attention_mask=mask).logits
    for row, pad in enumerate(PADS):
        close(logits[row, : TOKENS - pad], expected(ours, tokens[row : row + 1, : TOKENS - pad])[0])


@pytest.mark.parametrize(
    "variant", ["hope", "two banks, linear", "grouped-query attention", "sliding window", "MAC", "MAL"]
)
@torch.no_grad()
def test_generation_by_cache_equals_recomputation(variant: str, tokens: Tensor):
    _, theirs = make_pair(variant)
    mask = torch.tensor([[0] * pad + [1] * (21 - pad) for pad in PADS])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found, anew = (
        theirs.generate(tokens[:, :21] * mask, attention_mask=mask, use_cache=cached, **options)
        for cached in (True, False)
    )
    alone = theirs.generate(tokens[1:2, PADS[1] : 21], **options)
    for row, pad in enumerate(PADS):
        text, logits = found.sequences[row : row + 1, 21:], torch.stack(found.logits, 1)[row : row + 1]
        whole = theirs(found.sequences[row : row + 1, pad:-1]).logits[:, 20 - pad :]
        for other in (anew.sequences[row : row + 1, 21:], *([alone.sequences[:, -12:]] if row == 1 else [])):
            assert_same_text(text, logits, whole, 1e-5, other)


@torch.no_grad()
def test_scores_of_beams_are_those_of_their_texts(tokens: Tensor):
    """Whichever of two equally likely beams survives, what its cache holds is its own text."""
    _, theirs = make_pair("hope")
    mask = torch.tensor([[0] * pad + [1] * (21 - pad) for pad in PADS])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, "num_beams": 2}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = theirs.generate(tokens[:, :21] * mask, **options)
    for row, pad in enumerate(PADS):
        text = found.sequences[row : row + 1, pad:]
        chances = theirs(text[:, :-1]).logits.log_softmax(-1).gather(-1, text[:, 1:, None])[0, -12:, 0]
        close(found.sequences_scores[row], chances.mean())


def test_padding_between_tokens_is_refused(tokens: Tensor):
    _, theirs = make_pair("hope")
    mask = torch.ones_like(tokens)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="has a gap"):
        theirs(tokens, attention_mask=mask)


def test_labels_give_a_loss(tokens: Tensor):
    ours, theirs = make_pair("hope")
    loss = theirs(tokens, labels=tokens).loss
    logits = expected(ours, tokens)[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


@pytest.mark.parametrize("variant", ["all kinds", "MAC", "attention", "independent levels"])
def test_loaded_in_bf16_it_keeps_in_float32_what_ours_keeps(variant: str, tmp_path: Path):
    ours, theirs = make_pair(variant)
    theirs.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert found == {name for name, parameter in ours.named_parameters() if parameter.spec.keep_fp32}
