from __future__ import annotations

import pytest

from hopescale.config.load import load_recipe, load_resolved
from hopescale.config.show import ABSENT, diff, format_diff, identity_problems, model_problems, show


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("model: {cms: {levels: {mlp: {d_ff: 64}}}}\ndata: {sources: {main: {path: d}}}\n")
    return lambda *overrides: load_recipe("x.yaml", overrides)


def test_shown_text_names_origins_and_is_the_config(load, tmp_path):
    loaded = load("name=0123", "optim.groups.no_decay=null")
    text = show(loaded.config, loaded.origins)
    assert 'name: "0123"  # command line\n' in text
    assert "        d_ff: 64  # x.yaml\n" in text
    assert "  d_model: 256\n" in text
    (tmp_path / "shown.yaml").write_text(text)
    assert load_resolved(tmp_path / "shown.yaml") == loaded.config


def test_difference(load):
    old = load().config
    assert diff(old, old) == []
    changes = diff(old, load("train.steps=5", "model.cms.levels.mlp=null", "data.sources.main.path=null").config)
    assert ("train.steps", 1000, 5) in changes
    assert ("data.sources.main.path", "d", None) in changes
    assert ("model.cms.levels.mlp.d_ff", 64, ABSENT) in changes
    assert "train.steps: 1000 -> 5" in format_diff(changes).splitlines()
    assert "model.cms.levels.mlp.d_ff: 64 -> (absent)" in format_diff(changes).splitlines()


@pytest.mark.parametrize(
    "override",
    [
        "model.d_model=512",
        "model.cms.levels.mlp.update_every_steps=2",
        "model.cms.levels.b={}",
        "data.seed=1",
        "data.sources.main.weight=2",
        "data.sources.new={path: e}",
        "data.sources.main={path: null, synthetic: {}}",
        "train.seq_len=512",
        "train.global_batch_tokens=32Ki",
        "train.seed=1",
    ],
)
def test_a_resumed_run_keeps_its_identity(load, override):
    problems = identity_problems(load().config, load(override).config)
    assert problems and all(problem.key.startswith(override.partition("=")[0]) for problem in problems)
    assert "a run cannot change it" in problems[0].message


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=5",
        "optim.lr=1",
        "optim.schedule.name=wsd",
        "log.every=1",
        "checkpoint.every=5",
        "train.validation.every=null",
        "train.device=cpu",
        "train.micro_batch_size=4",
        "data.prefetch=0",
        "data.max_epochs=2",
        "data.staged=/local",
        "data.sources.main.path=elsewhere",
        "name=other",
    ],
)
def test_a_resumed_run_may_change_the_rest(load, override):
    old, new = load().config, load(override).config
    assert identity_problems(old, new) == [] and len(diff(old, new)) == 1


def test_weights_begin_models_whose_levels_keep_their_order(load):
    levels = ("model.cms.levels.mlp.update_every_steps=2", "model.cms.levels.slow={d_ff: 64, update_every_steps: 4}")
    old = load(*levels).config
    slower = load(*levels, "model.cms.levels.slow.update_every_steps=8").config
    assert model_problems(old, slower, "there") == []
    (problem,) = model_problems(old, load(*levels, "model.cms.levels.slow.update_every_steps=1").config, "there")
    assert problem.key == "model.cms.levels" and "are slow, mlp from fast to slow, but mlp, slow" in problem.message


def test_weights_begin_models_whose_memories_have_another_pace(load):
    mixers = ("model.mixers.hope={kind: self_modifying, far: {chunk_size: 128}}", "model.mixers.ttt.kind=ttt")
    mixers += ("model.pattern=[hope, ttt]",)
    old = load(*mixers).config
    new = load(*mixers, "model.mixers.hope={chunk_size: 8, reset_every: 64, far: {chunk_size: 64}}").config
    assert model_problems(old, new, "there", weights_alone=True) == []
    changed = {problem.key.removeprefix("model.mixers.hope.") for problem in model_problems(old, new, "there")}
    assert changed == {"chunk_size", "reset_every", "far.chunk_size"}, "a carried state is at a place of a chunk"
    for override, key in (
        ("ttt.chunk_size=8", "ttt.chunk_size"),
        ("hope.far=null", "hope.far"),
        ("hope.projection_chunk_size=128", "hope.projection_chunk_size"),
    ):
        other = load(*mixers, f"model.mixers.{override}").config
        keys = [problem.key for problem in model_problems(old, other, "there", weights_alone=True)]
        assert f"model.mixers.{key}" in keys


@pytest.mark.parametrize(
    ("memory", "before", "after", "is_same"),
    [
        ("linear", "false", "null", True),
        ("mlp", "true", "null", True),
        ("mlp", "false", "null", False),
        ("mlp", "true", "false", False),
    ],
)
def test_an_old_run_goes_on_where_null_means_what_it_says(load, memory: str, before: str, after: str, is_same: bool):
    mixer = f"model.mixers.hope={{kind: self_modifying, memory: {memory}, normalize_writes: %s}}"
    old, new = (load(mixer % value).config for value in (before, after))
    for problems in (identity_problems(old, new), model_problems(old, new, "there")):
        assert [problem.key for problem in problems] == ([] if is_same else ["model.mixers.hope.normalize_writes"])
