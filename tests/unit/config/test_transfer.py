"""How much wider a model is than its base, and what is refused."""

from __future__ import annotations

import pytest

from hopescale.config.check import check
from hopescale.config.load import load_recipe
from hopescale.config.schema import ModelConfig, SelfModifyingConfig, TransferConfig
from hopescale.config.show import identity_problems
from hopescale.config.transfer import attention_scale, base_width, growth, logit_multiplier

BASE = "model.transfer.base_width=32"
MATRICES = "optim.groups.matrices={rule: RULE, match: ['*_proj.weight']}"


def make(base_head_dim: int | None = None, **settings) -> ModelConfig:
    return ModelConfig(d_model=512, num_heads=8, transfer=TransferConfig(64, base_head_dim), **settings)


def test_sizes_grow_as_the_widths_say():
    assert growth(make()) == {"width": 8.0, "head": 1.0, "memory": 1.0, "one": 1.0}
    assert growth(make(16)) == {"width": 8.0, "head": 4.0, "memory": 4.0, "one": 1.0}
    stays = make(16, mixers={"hope": SelfModifyingConfig(memory_dim=32)})
    assert growth(stays) == {"width": 8.0, "head": 4.0, "memory": 1.0, "one": 1.0}
    assert set(growth(ModelConfig(d_model=512)).values()) == {1.0}


def test_factors_of_the_forward_pass():
    assert (base_width(make()), logit_multiplier(make())) == (64, 0.125)
    assert (base_width(ModelConfig(d_model=96)), logit_multiplier(ModelConfig(d_model=96))) == (96, 1.0)
    assert attention_scale(make(16)) == pytest.approx(16**0.5 / 64)
    assert attention_scale(make()) is attention_scale(make(64)) is attention_scale(ModelConfig()) is None


def problems_of(*overrides: str) -> list:
    loaded = load_recipe("debug", overrides)
    return check(loaded.config, loaded.origins)


REFUSED = [
    ("deep_momentum", [], "optim.groups.matrices.rule", "no factor makes the learning rate of deep_momentum"),
    ("m3", ["optim.m3.form=paper"], "optim.m3.second_moment", "true with paper"),
    ("m3", ["optim.m3.adjust_lr_fn=original"], "optim.m3.second_moment", "true with original"),
    ("m3", ["optim.m3.blocks=heads"], "optim.m3.blocks", "heads gives matrices of other shapes"),
    ("delta_momentum", ["optim.delta_momentum.form=paper"], "optim.delta_momentum.form", "erases less of memories"),
]


@pytest.mark.parametrize(("rule", "settings", "key", "message"), REFUSED)
def test_what_no_rate_holds_for_is_refused(rule: str, settings: list[str], key: str, message: str):
    using = [MATRICES.replace("RULE", rule), *settings]
    assert problems_of(*using) == []
    (problem,) = problems_of(BASE, *using)
    assert problem.key == key and message in problem.message


@pytest.mark.parametrize(
    "settings",
    [
        [],
        [MATRICES.replace("RULE", "muon")],
        [MATRICES.replace("RULE", "m3")],
        [MATRICES.replace("RULE", "m3"), "optim.m3={second_moment: false, adjust_lr_fn: original}"],
        [MATRICES.replace("RULE", "delta_momentum"), "optim.delta_momentum.beta2=0.9"],
        ["model.transfer.base_head_dim=16"],
    ],
)
def test_what_a_rate_holds_for_is_allowed(settings: list[str]):
    assert problems_of(BASE, *settings) == []


def test_a_base_of_no_width_is_refused():
    (problem,) = problems_of("model.transfer.base_width=0")
    assert problem.key == "model.transfer.base_width" and "at least 1" in problem.message


def test_a_run_keeps_its_base():
    old, new, none = (load_recipe("debug", settings).config for settings in ([BASE], [f"{BASE}0"], []))
    assert [problem.key for problem in identity_problems(old, new)] == ["model.transfer.base_width"]
    assert {problem.key for problem in identity_problems(none, old)} >= {"model.transfer.base_width"}
    assert identity_problems(old, old) == []
