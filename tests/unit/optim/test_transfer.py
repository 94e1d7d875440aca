"""The factor of each class of parameters and update rule against figures by hand, and groups that are split by them."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

from hopescale.common.errors import ConfigError
from hopescale.config.groups import assign_groups
from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    DeltaMomentumConfig,
    GroupConfig,
    LevelConfig,
    M3Config,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    SelfModifyingConfig,
    TransferConfig,
)
from hopescale.models import Model
from hopescale.optim.transfer import ParameterSizes, transfer_groups

LEVELS = {"fast": LevelConfig(d_ff=96), "slow": LevelConfig(d_ff=96, update_every_steps=2)}
HOPE = ModelConfig(vocab_size=64, d_model=64, num_layers=1, num_heads=4, cms=CmsConfig(levels=LEVELS))
MODELS = {
    "mlp": HOPE,
    "linear": replace(HOPE, mixers={"hope": SelfModifyingConfig(memory="linear", gate=True, query="memory")}),
    "static": replace(HOPE, tie_embeddings=False, mixers={"hope": SelfModifyingConfig(memory="linear", adaptive=())}),
    "attention": replace(
        HOPE,
        mixers={"attention": AttentionConfig(qkv_bias=True, qk_norm=True)},
        cms=CmsConfig("independent", LEVELS),
    ),
}
MORE, WIDER = TransferConfig(16), TransferConfig(16, base_head_dim=4)
"""Width 64 from 16, four times: by four heads for one, or by heads of 16 for heads of 4."""
MATRICES = ("*_proj.weight", "*.gate.weight", "*.up.weight", "*.down.weight", "*.mixer.banks.*")
LEFT = OptimConfig().groups["no_decay"].match

ADAMW = {
    "embedding.weight": (1, 1),
    "head.weight": (1, 1),
    "*norm.weight": (1, 1),
    "*.cms.mix": (1, 1),
    "*.conv.weight": (1, 1),
    "*.bias": (1, 1),
    "*.gates.*.weight": (1, 0.5),
    "*_proj.weight": (0.25, 0.25),
    "*.levels.*.gate.weight": (0.25, 0.25),
    "*.levels.*.up.weight": (0.25, 0.25),
    "*.levels.*.down.weight": (0.25, 0.25),
    "*.banks.*.eta.w": (1, 0.5),
    "*.banks.*.alpha.w": (1, 0.5),
    "*.banks.*.w": (1, 0.25),
    "*.banks.*.w2": (1, 0.25),
    "*.banks.*.eta.w1": (1, 0.5),
    "*.banks.*.alpha.w1": (1, 0.5),
    "*.banks.*.w1": (1, 0.25),
}
"""Factors on AdamW's rate with more heads and with wider ones; the first pattern that matches counts."""


def sizes_of(config: ModelConfig) -> dict[str, ParameterSizes]:
    return {name: ParameterSizes(tuple(p.shape), p.spec.sizes) for name, p in Model(config).named_parameters()}


def transferred(config: ModelConfig, optim: OptimConfig) -> tuple[dict[str, str], dict[str, float], OptimConfig]:
    """Return the group and the rate's factor of each parameter, and the config with the groups."""
    sizes = sizes_of(config)
    assigned = assign_groups({name: each.shape for name, each in sizes.items()}, optim.groups)
    groups, changed = transfer_groups(assigned, sizes, config, optim)
    return groups, {name: changed.groups[group].lr_scale for name, group in groups.items()}, changed


@pytest.mark.parametrize("name", MODELS)
def test_factors_of_adamw_by_hand(name: str):
    for column, transfer in enumerate((MORE, WIDER)):
        _, factors, _ = transferred(replace(MODELS[name], transfer=transfer), OptimConfig())
        for parameter, factor in factors.items():
            expected = next(row for pattern, row in ADAMW.items() if fnmatchcase(parameter, pattern))
            assert factor == expected[column], parameter


def using(rule: str, **settings) -> OptimConfig:
    groups = {"matrices": GroupConfig(rule=rule, match=MATRICES), "no_decay": GroupConfig(match=LEFT, weight_decay=0.0)}
    return OptimConfig(groups=groups | {"decay": GroupConfig()}, **settings)


WIDE_HIDDEN = replace(HOPE, mixers={"hope": SelfModifyingConfig(memory_dim=64)})
"""MLP memories of which only the input grows with the head: from 4 to 16, to a hidden width of 64."""
BY_RULE: dict[str, tuple[OptimConfig, dict[str, tuple[float, float]]]] = {
    # lr sqrt(max(1, R / C)): square maps stay, tall ones lose a root of 4 with wider heads, and get it back.
    "muon": (using("muon"), {"in_proj.weight": (1, 1), "mem.w2": (1, 2), "mem.w1": (1, 1), "eta.w1": (1, 1)}),
    # lr sqrt(max(R, C)): maps of the width get 1 / sqrt(4); the longer side of a memory is its hidden width.
    "muon of AdamW's length": (
        using("muon", muon=MuonConfig(adjust_lr_fn="match_rms_adamw")),
        {"in_proj.weight": (0.5, 0.5), "fast.down.weight": (0.5, 0.5), "mem.w2": (1, 1), "eta.w1": (1, 1)},
    ),
    "m3": (using("m3"), {"in_proj.weight": (0.5, 0.5), "fast.up.weight": (0.5, 0.5), "mem.w2": (1, 1)}),
    "m3 by shape": (
        using("m3", m3=M3Config(second_moment=False, adjust_lr_fn="original")),
        {"in_proj.weight": (1, 1), "mem.w2": (1, 2)},
    ),
    "m3, paper": (using("m3", m3=M3Config(second_moment=False, form="paper")), {"out_proj.weight": (1, 1)}),
    # A head's gradient shrinks as its share of the model.
    "delta momentum": (using("delta_momentum"), {"in_proj.weight": (1, 1), "mem.w2": (4, 1), "eta.w1": (4, 1)}),
    "delta momentum over a second moment": (
        using("delta_momentum", delta_momentum=DeltaMomentumConfig(beta2=0.9)),
        {"in_proj.weight": (0.25, 0.25), "mem.w2": (1, 0.5), "eta.w1": (1, 1)},
    ),
}


@pytest.mark.parametrize("case", BY_RULE)
def test_factors_of_rules_for_matrices_by_hand(case: str):
    optim, expected = BY_RULE[case]
    for column, transfer in enumerate((MORE, WIDER)):
        _, factors, _ = transferred(replace(WIDE_HIDDEN, transfer=transfer), optim)
        for end, row in expected.items():
            (factor,) = {value for name, value in factors.items() if name.endswith(end)}
            assert factor == row[column], end
        assert factors["embedding.weight"] == factors["norm.weight"] == 1


def test_parts_of_a_group_keep_its_settings_and_its_decay_per_step():
    groups = {
        "slow": GroupConfig(match=("*_proj.weight",), lr_scale=0.1, betas=(0.5, 0.6), weight_decay=0.3),
        "rest": GroupConfig(),
    }
    optim = OptimConfig(lr=0.01, weight_decay=0.2, eps=1e-6, groups=groups)
    assigned, factors, changed = transferred(replace(HOPE, transfer=MORE), optim)
    assert assigned["blocks.0.mixer.in_proj.weight"] == "slow*0.25" and assigned["embedding.weight"] == "rest"
    assert assigned["blocks.0.cms.levels.fast.up.weight"] == "rest*0.25"
    assert changed.groups["slow*0.25"] == replace(groups["slow"], lr_scale=0.025, weight_decay=1.2)
    assert changed.groups["rest*0.25"].lr_scale * changed.groups["rest*0.25"].weight_decay == pytest.approx(0.2)
    assert changed.groups["rest"] == groups["rest"]
    assert (changed.eps, changed.m3.eps) == (optim.eps / 4, optim.m3.eps / 4)


@pytest.mark.parametrize("transfer", [None, TransferConfig(64), TransferConfig(64, base_head_dim=16)])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_without_it_and_at_the_base_width(name: str, transfer: TransferConfig | None):
    config, optim = replace(MODELS[name], transfer=transfer), OptimConfig()
    assigned, _, changed = transferred(config, optim)
    assert assigned == assign_groups({n: s.shape for n, s in sizes_of(config).items()}, optim.groups)
    assert changed == optim
    tokens = torch.arange(24).view(2, 12)
    plain, other = (Model(each, seed=3) for each in (MODELS[name], config))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), other.parameters(), strict=True))
    assert torch.equal(plain(tokens)[0], other(tokens)[0])


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_by_hand(name: str):
    """Width 64 from 16: the final norm begins as at width 16, all else as it does anyway; logits are a quarter."""
    plain, wide = (Model(replace(MODELS[name], transfer=transfer, init_std=0.1), seed=3) for transfer in (None, WIDER))
    for (parameter, p), q in zip(plain.named_parameters(), wide.parameters(), strict=True):
        if parameter == "norm.weight":
            torch.testing.assert_close(p.detach(), torch.full((64,), 0.25 / (0.1 * 8)))
            torch.testing.assert_close(q.detach(), torch.full((64,), 0.25 / (0.1 * 4)))
        else:
            assert torch.equal(p, q), parameter
    x = torch.randn(3, 2, 64)
    torch.testing.assert_close(wide.norm(x)[1], plain.norm(x)[1] * 2 / 4)
    if name == "attention":
        assert wide.blocks["0"].mixer.scale == math.sqrt(4) / 16


@pytest.mark.parametrize(
    "pattern", ["embedding.weight", "head.weight", "*.gates.*.weight", "*.conv.weight", "blocks.0.norm.weight"]
)
def test_what_is_no_linear_map_is_left_to_adamw(pattern: str):
    config = replace(MODELS["static"], transfer=MORE)
    parameters = {"some": ParameterSizes((8, 8), ("width", "width"))} | {
        name: each for name, each in sizes_of(config).items() if fnmatchcase(name, pattern)
    }
    groups = {"all": GroupConfig(rule="muon")}
    with pytest.raises(ConfigError, match="is no linear map") as refused:
        transfer_groups(dict.fromkeys(parameters, "all"), parameters, config, OptimConfig(groups=groups))
    assert len(refused.value.problems) == len(parameters) - 1
