from __future__ import annotations

import pytest

from hopescale.common.paths import display_path, shipped_folder
from hopescale.config.check import check
from hopescale.config.fields import leaves
from hopescale.config.load import DEFAULT, load_recipe
from hopescale.config.plan import make_plan
from hopescale.cost.params import count_params

RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
SIZES = {"tiny": 4e6, "170m": 170e6, "340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}
ARCHITECTURES = ("hope", "hope_attention", "transformer")


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_checks_and_plans(name):
    loaded = load_recipe(name)
    assert check(loaded.config, loaded.origins) == []
    assert make_plan(loaded.config).grad_accumulation >= 1
    assert loaded.config.name == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_names_say(architecture, size):
    config = load_recipe(f"{architecture}_{size}").config
    assert count_params(config.model)["total"] == pytest.approx(SIZES[size], rel=0.03)
    assert list(config.model.mixers) == ["hope" if architecture == "hope" else "attention"]
    assert make_plan(config).head_dim in (64, 128)
    periods = [level.update_every_steps for level in config.model.cms.levels.values()]
    assert periods == ([1] if architecture == "transformer" else [1, 4, 16])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_only_what_differs_from_its_base(name):
    loaded = load_recipe(name)
    if len(loaded.files) == 1:
        return
    below = load_recipe(loaded.files[-2])
    old, new, here = leaves(below.config), leaves(loaded.config), display_path(loaded.recipe)
    own = [key for key, origin in loaded.origins.items() if origin == here]
    assert [key for key in own if below.origins.get(key, DEFAULT) != DEFAULT and old[key] == new[key]] == []
