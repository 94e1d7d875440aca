from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.groups import assign_groups, group_summary, group_table
from hopescale.config.schema import (
    KINDS,
    GroupConfig,
    LevelConfig,
    ModelConfig,
    OptimConfig,
)
from hopescale.config.schema.model import CmsConfig
from hopescale.models import Model

GROUPS = {
    "still": GroupConfig(match=("*norm.weight", "*.bias")),
    "deep": GroupConfig(match=("blocks.*.w",)),
    "rest": GroupConfig(),
}


def matrices(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (4, 4))


def test_every_parameter_is_in_exactly_one_group():
    names = ["embedding.weight", "blocks.0.w", "blocks.1.w", "blocks.0.norm.weight", "head.bias"]
    assert assign_groups(matrices(*names), GROUPS) == dict(
        zip(names, ["rest", "deep", "deep", "still", "still"], strict=True)
    )


def test_case_matters():
    groups = {"deep": GroupConfig(match=("blocks.*.w",)), "rest": GroupConfig()}
    assert assign_groups(matrices("Blocks.0.w", "blocks.0.w"), groups) == {"Blocks.0.w": "rest", "blocks.0.w": "deep"}


def test_a_group_that_takes_nothing_is_an_error():
    groups = {"lost": GroupConfig(match=("nothing*", "?")), "rest": GroupConfig()}
    with pytest.raises(ConfigError, match=r"optim.groups.lost.match: no parameter matches nothing\*, \?"):
        assign_groups(matrices("blocks.0.w"), groups)


def test_errors_name_each_parameter_and_its_groups():
    groups = {"a": GroupConfig(match=("x*",)), "b": GroupConfig(match=("*y",))}
    with pytest.raises(ConfigError) as caught:
        assign_groups(matrices("x1", "xy", "z", "1y"), groups)
    assert [str(problem) for problem in caught.value.problems] == [
        "  optim.groups: parameter xy matches a and b",
        "  optim.groups: parameter z matches no group",
    ]
    assert caught.value.exit_code == 2


def test_a_rule_for_matrices_takes_no_vector_and_nothing_that_stages_share():
    groups = {"m": GroupConfig(match=("blocks.*", "embedding"), rule="m3"), "rest": GroupConfig()}
    shapes = {"blocks.w": (4, 4), "blocks.heads": (2, 4, 4), "blocks.bias": (4,), "embedding": (8, 4), "norm": (4,)}
    with pytest.raises(ConfigError) as caught:
        assign_groups(shapes, groups, tied=["embedding"])
    assert [(problem.key, problem.message) for problem in caught.value.problems] == [
        ("optim.groups.m.rule", "m3 updates matrices, but blocks.bias has shape [4]"),
        ("optim.groups.m.rule", "m3 cannot update embedding, which two pipeline stages hold"),
    ]
    assert assign_groups({name: shapes[name] for name in shapes if name != "blocks.bias"}, groups)["embedding"] == "m"


def test_the_group_of_the_rest_takes_no_matched_parameter():
    assert assign_groups(matrices("x1"), {"rest": GroupConfig(), "a": GroupConfig(match=("x*",))}) == {"x1": "a"}


@pytest.mark.parametrize("variant", ["sequential", "independent"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_groups_keep_vectors_from_decay(kind: str, variant: str):
    """Norms, gates, convolutions and mixing weights are not decayed; matrices are, whatever a level is called."""
    levels = {"fast": LevelConfig(d_ff=8), "slow": LevelConfig(d_ff=8, update_every_steps=2)}
    config = ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=1,
        num_heads=2,
        mixers={"mixer": KINDS[kind]()},
        cms=CmsConfig(variant=variant, levels=levels),
    )
    names = {name: parameter.shape for name, parameter in Model(config).named_parameters()}
    still = {name for name, group in assign_groups(names, OptimConfig().groups).items() if group == "no_decay"}
    expected = {n for n in names if any(part in n for part in ("norm.", ".gates.", ".conv.", "cms.mix"))}
    assert still == expected and len(still) >= 3


def test_the_table_has_a_line_per_parameter():
    assigned, sizes = {"a.weight": "decay", "norm.weight": "no_decay"}, {"a.weight": 12_345, "norm.weight": 7}
    table = group_table(assigned, sizes, {"decay": 3e-3, "no_decay": 1.5e-3})
    expected = ["decay     3.000e-03        12,345  a.weight", "no_decay  1.500e-03             7  norm.weight"]
    assert table.splitlines() == expected


def test_the_summary_counts_parameters_and_entries_of_each_group():
    assigned = {"a.weight": "decay", "b.weight": "decay", "norm.weight": "no_decay"}
    sizes = {"a.weight": 1200, "b.weight": 800, "norm.weight": 7}
    assert group_summary(assigned, sizes) == "decay 2 (2k), no_decay 1 (7)"
