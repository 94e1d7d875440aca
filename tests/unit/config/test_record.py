from __future__ import annotations

import json
from pathlib import Path

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.record import write_record

OVERRIDES = ["train.steps=7", "optim.groups.no_decay=null", 'optim.groups.decay.match=["*"]', "data.seed=4"]


def record(folder: Path, recipe: str, overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    write_record(folder, load_recipe(recipe, overrides), Layout(), overrides)
    origins = json.loads((folder / "origins.json").read_text())
    return (folder / "overrides.txt").read_text().splitlines(), origins


def test_a_run_started_from_its_own_config_is_the_same_and_remembers_where_it_came_from(tmp_path: Path):
    first = record(tmp_path, "debug", OVERRIDES)
    config = (tmp_path / "config.yaml").read_text()
    assert "no_decay: null" in config
    own = str(tmp_path / "config.yaml")
    assert load_recipe(own).config == load_recipe("debug", OVERRIDES).config
    assert record(tmp_path, own, []) == first
    assert (tmp_path / "config.yaml").read_text() == config
    overrides, origins = record(tmp_path, own, ["optim.lr=1e-4"])
    assert overrides == [*OVERRIDES, "optim.lr=1e-4"]
    assert {key for key in origins if origins[key] != first[1][key]} == {"optim.lr"}


def test_another_recipe_replaces_the_record(tmp_path: Path):
    record(tmp_path, "debug", OVERRIDES)
    overrides, origins = record(tmp_path, "hope_tiny", ["train.steps=3"])
    assert overrides == ["train.steps=3"] and origins["data.seed"] == "default"
