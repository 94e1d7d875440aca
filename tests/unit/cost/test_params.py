from __future__ import annotations

import pytest

from hopescale.config.schema import AttentionConfig, CmsConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.cost.params import count_params, describe_params

LEVELS = {"fast": LevelConfig(d_ff=5), "slow": LevelConfig(d_ff=7)}


def model(**changes) -> ModelConfig:
    sizes = {"vocab_size": 130, "d_model": 8, "num_layers": 2, "num_heads": 2, "cms": CmsConfig(levels=LEVELS)}
    return ModelConfig(**{**sizes, **changes})


def test_attention_model_by_hand():
    attention = AttentionConfig(qk_norm=True)
    counts = count_params(model(mixers={"attention": attention}, tie_embeddings=False))
    assert counts["embedding"] == counts["head"] == 256 * 8
    assert counts["mixers"] == 2 * (4 * 8 * 8 + 2 * 4)
    assert counts["levels"] == 2 * 3 * 8 * (5 + 7)
    assert counts["norms"] == 2 * 3 * 8 + 8
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")


def test_a_tied_head_is_counted_once():
    assert count_params(model())["head"] == 0
    assert "embedding 2.05k, head tied" in describe_params(model())
    assert "embedding 2.05k, head 2.05k" in describe_params(model(tie_embeddings=False))


def test_independent_levels_share_a_norm_and_have_mix_weights():
    sequential, independent = count_params(model()), count_params(model(cms=CmsConfig("independent", LEVELS)))
    assert independent["levels"] == sequential["levels"] + 2 * 2
    assert independent["norms"] == sequential["norms"] - 2 * 8


def mixer(**changes) -> int:
    """Parameters of one mixer with 2 heads of 4 in a model of width 8."""
    return count_params(model(num_layers=1, mixers={"hope": SelfModifyingConfig(**changes)}))["mixers"]


def test_hope_by_hand():
    maps, conv, norm = 8 * 8 * (3 + 1), 3 * 8 * 4, 8
    memories = 2 * (3 * 2 * 4 * 4 + 2 * (4 * 4 + 4))
    gates = 2 * (1 + 1 + (4 + 1))
    assert mixer() == maps + conv + memories + gates + norm


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"memory": "linear"}, -2 * (3 * 4 * 4 + 2 * 4 * 4)),
        ({"memory_dim": 5}, 2 * (3 * 2 * 4 + 2 * (4 + 1))),
        ({"gate": True}, 8 * 8),
        ({"conv_width": None}, -3 * 8 * 4),
        ({"momentum": False}, -2 * 5),
        ({"adaptive": ("k", "v", "eta")}, -2 * (4 * 4 + 4) + 2 * 4),
        ({"adaptive": ("k", "v", "eta"), "retention": False}, -2 * (4 * 4 + 4) - 2),
        ({"adaptive": ("v", "eta", "alpha")}, -2 * 2 * 4 * 4),
        ({"query": "memory"}, 2 * 2 * 4 * 4),
    ],
)
def test_what_each_switch_adds(changes, added):
    assert mixer(**changes) == mixer() + added
