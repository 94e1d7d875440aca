"""Names, shapes and splits are those of the modules."""

from __future__ import annotations

import pytest
import torch

from hopescale.config.load import load_recipe
from hopescale.cost.parameter import ParameterShape
from hopescale.cost.params import model_parameters
from hopescale.models import Model
from hopescale.models.model import level_of

VARIANTS = {
    "hope": [],
    "linear": ["model.mixers.hope.memory=linear"],
    "far memory": ["model.mixers.hope={far: {chunk_size: 64}, retention: false, adaptive: [k]}"],
    "two banks": ["model.mixers.hope={adaptive: [k, eta], query: memory, gate: true, projection_chunk_size: 64}"],
    "static": ["model.mixers.hope={adaptive: [], targets: value, momentum: false, conv_width: null}"],
    "no retention": ["model.mixers.hope={adaptive: [v], retention: false, memory_dim: 20}"],
    "attention": [
        "model.mixers.hope.kind=attention",
        "model.mixers.hope={qk_norm: true, qkv_bias: true, num_kv_heads: 1}",
    ],
    "untied, independent": ["model.tie_embeddings=false", "model.cms.variant=independent"],
    "depth": ["model.cms.placement=depth", "model.num_layers=3"],
}


@pytest.mark.parametrize("slices", [None, [range(1)], [range(1, 2)]], ids=["whole", "first", "last"])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_the_inventory_is_the_model(overrides: list[str], slices: list[range] | None):
    config = load_recipe("debug", overrides).config.model
    with torch.device("meta"):
        model = Model(config, blocks=None if slices is None else slices[0])
    found = [
        ParameterShape(name, tuple(p.shape), p.spec.partition_dim, p.spec.keep_fp32, level_of(name), parts=p.spec.parts)
        for name, p in model.named_parameters()
    ]
    assert model_parameters(config, slices) == found


def test_a_slice_is_cut_along_its_split():
    assert ParameterShape("a", (6, 4), split=1).slice(2).shape == (6, 2)
    assert ParameterShape("a", (6, 4)).slice(2).shape == (6, 4)


def test_bytes_of_an_entry():
    assert [ParameterShape("a", (1,), keep_fp32=keep).itemsize("bf16") for keep in (True, False)] == [4, 2]
    assert ParameterShape("a", (1,)).itemsize("fp32") == 4
