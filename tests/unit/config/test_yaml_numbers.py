from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.load import load_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 010}", "010 is 8 to YAML"),
        ("optim: {betas: [0.9, 00]}", "00 is 0 to YAML"),
        ("train: {steps: 1:30}", "1:30 is 90 to YAML"),
        ("optim: {lr: 24:00:00}", "24:00:00 is 86400 to YAML"),
        ("optim: {lr: 1:30.5}", "1:30.5 is 90.5 to YAML"),
    ],
)
def test_numbers_that_yaml_reads_otherwise_than_people_are_refused(tmp_path: Path, text: str, message: str):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"base: debug\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe)
    assert message in str(caught.value) and "r.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        load_recipe("debug", [text.replace(": ", "=", 1)])


def test_other_numbers_are_what_they_look_like(tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text('base: debug\nname: "1:30"\ntrain: {steps: 10, seed: 0}\noptim: {lr: 0.01}\n')
    config = load_recipe(recipe, ["train.steps=010"]).config
    assert (config.name, config.train.steps, config.train.seed, config.optim.lr) == ("1:30", 10, 0, 0.01)
