from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.load import load_recipe, load_resolved, to_yaml
from hopescale.config.schema import GroupConfig, LevelConfig, RunConfig, SyntheticConfig


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write recipe files below the working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write_file


def problems_of(recipe, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return {problem.key: problem for problem in caught.value.problems}


def test_later_layers_win_and_leave_their_origin(write):
    write("base/deep.yaml", "train: {steps: 1, seq_len: 2, seed: 3}\nname: deep\n")
    write("base/mid.yaml", "base: deep.yaml\ntrain: {seq_len: 4Ki, seed: 5}\n")
    recipe = write("x.yaml", "base: base/mid.yaml\ntrain:\n  seed: 6\n")
    loaded = load_recipe(recipe, ["optim.lr=4e-4", "train.seed=7", "train.seed=8"])
    assert (loaded.config.train.steps, loaded.config.train.seq_len, loaded.config.train.seed) == (1, 4096, 8)
    assert loaded.config.optim.lr == 4e-4 and loaded.config.name == "deep"
    assert loaded.origins["train.steps"] == "base/deep.yaml"
    assert loaded.origins["train.seq_len"] == "base/mid.yaml"
    assert loaded.origins["train.seed"] == loaded.origins["optim.lr"] == "command line"
    assert loaded.origins["model.d_model"] == "default"
    assert loaded.recipe == Path("x.yaml")
    assert loaded.files == [Path("base/deep.yaml"), Path("base/mid.yaml"), Path("x.yaml")]


def test_an_empty_recipe_is_the_defaults(write):
    loaded = load_recipe(write("x.yaml", ""))
    assert loaded.config == RunConfig()
    assert set(loaded.origins.values()) == {"default"}


def test_the_config_is_frozen(write):
    with pytest.raises(FrozenInstanceError):
        load_recipe(write("x.yaml", "")).config.train.steps = 3


def test_entries_are_added_changed_and_removed(write):
    write("b.yaml", "model: {cms: {levels: {fast: {d_ff: 8, phase: 1}, slow: {d_ff: 16}}}}\n")
    recipe = write("x.yaml", "base: b.yaml\nmodel: {cms: {levels: {slow: null, mid: {d_ff: 12}}}}\n")
    loaded = load_recipe(recipe, ["model.cms.levels.fast.d_ff=9", "optim.groups.no_decay=null"])
    assert loaded.config.model.cms.levels == {"fast": LevelConfig(d_ff=9, phase=1), "mid": LevelConfig(d_ff=12)}
    assert loaded.config.optim.groups == {"decay": GroupConfig()}
    assert loaded.origins["model.cms.levels.fast.phase"] == "b.yaml"
    assert loaded.origins["model.cms.levels.mid.phase"] == "default"
    assert not [key for key in loaded.origins if ".slow" in key or "no_decay" in key]


def test_an_entry_removed_and_set_again_starts_from_the_defaults(write):
    write("b.yaml", "model: {cms: {levels: {fast: {d_ff: 8, phase: 1}}}}\n")
    loaded = load_recipe(
        write("x.yaml", "base: b.yaml\nmodel: {cms: {levels: {fast: null}}}\n"), ["model.cms.levels.fast.d_ff=9"]
    )
    assert loaded.config.model.cms.levels == {"fast": LevelConfig(d_ff=9)}
    assert loaded.origins["model.cms.levels.fast.phase"] == "default"


def test_sections_can_be_overridden_as_yaml(write):
    loaded = load_recipe(
        write("x.yaml", ""), ["data.sources.a={synthetic: {task: copy}, weight: 2}", "data.sources.b.path=c d"]
    )
    sources = loaded.config.data.sources
    assert sources["a"].synthetic == SyntheticConfig(task="copy") and sources["a"].weight == 2.0
    assert sources["b"].path == "c d" and sources["b"].synthetic is None


def test_every_problem_of_every_layer_is_reported_with_its_origin(write):
    write("b.yaml", "train: {steps: many, stpes: 3}\nname: 3\n")
    recipe = write("x.yaml", "base: b.yaml\nmodel: {tie_embeddings: mamba}\noptim: {betas: [1, 2, 3]}\n")
    problems = problems_of(recipe, ["lr=3", "train.seed=1.5", "oops", "model=3"])
    origins = {key: problem.origin for key, problem in problems.items()}
    assert origins == {
        "train.steps": "b.yaml",
        "train.stpes": "b.yaml",
        "name": "b.yaml",
        "model.tie_embeddings": "x.yaml",
        "optim.betas": "x.yaml",
        "lr": "command line",
        "train.seed": "command line",
        "oops": "command line",
        "model": "command line",
    }
    assert problems["train.steps"].message == "expected int, got many"
    assert problems["train.stpes"].message == "unknown key"
    assert problems["train.seed"].message == 'expected int, got "1.5"'


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stpes", "train.steps"),
        ("trian.steps", "train.steps"),
        ("optim.schedul.name", "optim.schedule.name"),
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("model.cms.levels.slow.chunk_sise", "known here: d_ff, update_every_steps, phase"),
        ("model.cms.slow.d_ff", "model.cms.levels.NAME.d_ff"),
        ("model.cms.levels.slow.d_fff", "model.cms.levels.slow.d_ff"),
    ],
)
def test_unknown_keys_come_with_a_guess(write, key, meant):
    problem = problems_of(write("x.yaml", ""), [f"{key}=1"])[key]
    assert problem.message == "unknown key" and meant in problem.hint


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "x.yaml:3", "duplicate key"),
        ("train: [1\nname: y\n", "x.yaml:2", "did not find"),
        ("- 1\n", "x.yaml", "expected a mapping"),
        ("3\n", "x.yaml", ""),
        ("a: ${b\n", "x.yaml", ""),
        ("\0", "x.yaml", ""),
        ("base: 3\n", "x.yaml", "base must be a path"),
        ("base: nope.yaml\n", "x.yaml", "base nope.yaml does not exist"),
        ("name: ${model.d_model}\n", "name", "interpolation"),
        ("train.steps: 3\n", "train.steps", "unknown key"),
        ("train:\n", "train", "expected a section, got null"),
        ("data: {sources: {a.b: {path: c}}}\n", "data.sources.a.b", "not a name"),
        ("data: {sources: {1: {path: c}}}\n", "data.sources.1", "not a name"),
    ],
)
def test_broken_files_are_named(write, text, key, message):
    problems = problems_of(write("x.yaml", text), ["train.nope=1"])
    assert message in problems[key].message
    assert "train.nope" in problems  # overrides are read all the same


def test_circular_and_deep_bases_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: a.yaml\n")
    assert "circular base: a.yaml -> b.yaml -> a.yaml" in problems_of("a.yaml")["b.yaml"].message
    for name, base in [("1", "2"), ("2", "3"), ("3", "4")]:
        write(f"{name}.yaml", f"base: {base}.yaml\n")
    write("4.yaml", "")
    assert "more than 2 levels of base" in problems_of("1.yaml")["3.yaml"].message
    assert load_recipe("2.yaml").config == RunConfig()


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name, by_file = load_recipe("hope_170m"), load_recipe("hope_170m.yaml")
    assert by_name.config == by_file.config and by_name.config.name == "hope_170m"
    assert load_recipe("hope_1.3b").config.name == "hope_1.3b"


def test_a_recipe_can_build_on_a_shipped_one(write):
    loaded = load_recipe(write("mine.yaml", "base: hope_tiny\nname: mine\nmodel: {cms: {levels: {slow: null}}}\n"))
    assert set(loaded.config.model.cms.levels) == {"fast", "mid"}
    assert [file.name for file in loaded.files] == ["hope.yaml", "hope_tiny.yaml", "mine.yaml"]


def test_a_missing_recipe_lists_what_there_is():
    problem = problems_of("hop_170m", ["train.nope=1"])["hop_170m"]
    assert "hope_170m" in problem.hint
    assert "hope_170m" in problems_of("zzz")["zzz"].hint


def test_a_resolved_config_reads_back_exactly(tmp_path):
    loaded = load_recipe(
        "hope_170m",
        [
            "optim.groups.no_decay=null",
            "data.sources.s={synthetic: {}}",
            "name=1e-4",
            "optim.lr=1e-7",
            "data.sources.main.path=null",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(loaded.config))
    assert load_resolved(path) == loaded.config


def test_a_broken_resolved_config_is_a_config_error(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="no such file"):
        load_resolved(path)
    path.write_text("train: {steps: x}\n")
    with pytest.raises(ConfigError, match=r"train\.steps"):
        load_resolved(path)
