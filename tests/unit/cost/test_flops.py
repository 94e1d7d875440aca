from __future__ import annotations

from dataclasses import replace

import pytest

from hopescale.config.schema import AttentionConfig, CmsConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.cost.params import count_params

MODEL = ModelConfig(vocab_size=256, d_model=64, num_heads=4, cms=CmsConfig(levels={"mlp": LevelConfig(d_ff=128)}))
ATTENTION = replace(MODEL, mixers={"attention": AttentionConfig()})


def test_attention_is_six_per_weight_and_the_causal_scores():
    counts = count_params(ATTENTION)
    weights = counts["embedding"] + counts["mixers"] + counts["levels"]  # the tied head's product
    scores = 4 * 2 * 2 * 64 * (128 + 1) / 2  # layers, two products, width, tokens seen
    assert flops_per_token(ATTENTION, 128) == 6 * weights + 3 * scores


def test_memories_do_not_grow_with_the_context():
    assert flops_per_token(MODEL, 4096) == pytest.approx(flops_per_token(MODEL, 65_536), rel=0.01)
    assert flops_per_token(ATTENTION, 65_536) > 2 * flops_per_token(ATTENTION, 64)


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        ({"inner_rule": "gd"}, {}),
        ({"momentum": False}, {}),
        ({"memory": "linear"}, {}),
        ({"read": "boundary"}, {}),
        ({"chunk_size": 16}, {}),
        ({}, {"query": "memory"}),
        ({}, {"memory_dim": 64}),
        ({}, {"gate": True}),
    ],
    ids=str,
)
def test_switches_have_their_price(cheaper, dearer):
    costs = [
        flops_per_token(replace(MODEL, mixers={"hope": SelfModifyingConfig(**changes)}), 256)
        for changes in (cheaper, dearer)
    ]
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307),
        ("h100", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_speed_by_device_name(name, tera):
    assert peak_bf16_flops(name) == (None if tera is None else tera * 10**12)
