"""A changed sweep file goes on with the trials that have begun, whatever it calls them now."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.config.load import to_yaml
from hopescale.sweep.begun import left_over, under_old_names
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.progress import require_same, trial_folder
from hopescale.sweep.trial import Trial

HOPE = "hope: {recipe: debug}"
LINEAR = "linear: {recipe: debug, set: {model.mixers.hope.memory: linear}}"
AXES = "axes: {train.steps: [3, 4]}\n"


def trials_of(text: str, folder: Path) -> tuple[list[Trial], dict[str, str]]:
    (folder / "sweep.yaml").write_text(f"name: toy\n{text}")
    return under_old_names(make_trials(load_sweep(folder / "sweep.yaml")), folder)


def begin(trials: list[Trial], folder: Path) -> None:
    for trial in trials:
        (run_dir := trial_folder(folder, trial)).mkdir(parents=True)
        (run_dir / "config.yaml").write_text(to_yaml(trial.config))


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (f"series: {{{HOPE}}}\n{AXES}", f"series: {{{HOPE}, {LINEAR}}}\n{AXES}", ["steps3", "steps4"]),
        (f"series: {{{HOPE}, {LINEAR}}}\n{AXES}", f"series: {{{HOPE}}}\n{AXES}", ["hope-steps3", "hope-steps4"]),
        (f"recipe: debug\n{AXES}", "recipe: debug\naxes: {train.steps: [2, 3, 4]}\n", ["steps2", "steps3", "steps4"]),
        (
            f"recipe: debug\n{AXES}",
            "recipe: debug\naxes: {train.steps: [3, 4], train.seed: [0, 1]}\n",
            ["steps3", "steps3-seed1", "steps4", "steps4-seed1"],
        ),
    ],
    ids=["another series", "a series less", "another value", "another axis"],
)
def test_trials_go_on_under_their_names(before: str, after: str, names: list[str], tmp_path: Path):
    first, _ = trials_of(before, tmp_path)
    begin(first, tmp_path)
    then, renamed = trials_of(after, tmp_path)
    assert [trial.name for trial in then][: len(names)] == names
    assert len(then) == len({trial.name for trial in then})
    own = {trial.name: trial for trial in then}
    for trial in first:
        if trial.name in own:
            assert own[trial.name].config == trial.config
            assert set(own[trial.name].overrides) - {"train.seed=0"} == set(trial.overrides)
    require_same(load_sweep(tmp_path / "sweep.yaml"), then, tmp_path)
    assert left_over(then, tmp_path) == [trial.name for trial in first if trial.name not in own]
    assert set(renamed.values()) == set(own) & {trial.name for trial in first} if "steps2" not in own else not renamed


def test_texts_that_cannot_be_seen_do_not_change_places(tmp_path: Path):
    paths = "set: {data.sources.markov: null}\naxes: {data.sources.main.path: ['s3://x/wiki', 's3://x/code']}\n"
    first, _ = trials_of(f"series: {{{HOPE}}}\n{paths}", tmp_path)
    begin(first, tmp_path)
    then, _ = trials_of(f"series: {{{HOPE}, {LINEAR}}}\n{paths}", tmp_path)
    assert [(trial.name, trial.config) for trial in then[:2]] == [(trial.name, trial.config) for trial in first]
    only = paths.replace("wiki", "books")
    then, renamed = trials_of(f"series: {{{HOPE}, {LINEAR}}}\n{only}", tmp_path)
    assert renamed == {"hope-paths3_x_code": "paths3_x_code"}, "what was read as wiki is not taken for books"


def test_a_text_that_lies_here_twice_is_the_same(tmp_path: Path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(text)
    settings = "set: {data.sources.markov: null, data.sources.main.path: %s}\naxes: {train.steps: [3]}\n"
    begin(trials_of(f"series: {{{HOPE}}}\n{settings % (tmp_path / 'a')}", tmp_path)[0], tmp_path)
    for name, moved in (("b", 1), ("c", 0), ("none", 0)):
        _, renamed = trials_of(f"series: {{{HOPE}, {LINEAR}}}\n{settings % (tmp_path / name)}", tmp_path)
        assert len(renamed) == moved, name


def test_a_trial_with_another_config_is_another_trial(tmp_path: Path):
    begin(trials_of(f"series: {{{HOPE}}}\n{AXES}", tmp_path)[0], tmp_path)
    (tmp_path / "trials/steps4/config.yaml").write_text("no: config\n")
    changed = f"set: {{optim.lr: 0.5}}\nseries: {{{HOPE}, {LINEAR}}}\n{AXES}"
    then, renamed = trials_of(changed, tmp_path)
    assert then[0].name == "hope-steps3" and not renamed
    assert left_over(then, tmp_path) == ["steps3", "steps4"]


def test_what_trials_depend_on_keeps_its_name_too(tmp_path: Path):
    wsd = "set: {optim.schedule.name: wsd, optim.schedule.warmup_steps: 1}\ntokens: [8192, 16384]\nbranch: true\n"
    first, _ = trials_of(f"series: {{{HOPE}}}\n{wsd}", tmp_path)
    begin(first, tmp_path)
    then, _ = trials_of(f"series: {{{HOPE}, {LINEAR}}}\n{wsd}", tmp_path)
    assert [trial.branch for trial in then[:2]] == [trial.branch for trial in first]
    assert then[2].branch.trunk == then[3].name == "linear-d16384"


def test_candidates_keep_their_names_too(tmp_path: Path):
    choose = "axes: {optim.lr: [1e-3, 3e-3], train.seed: [0, 1]}\nchoose: optim.lr\n"
    first, _ = trials_of(f"series: {{{HOPE}}}\n{choose}", tmp_path)
    begin(first[:1], tmp_path)
    then, _ = trials_of(f"series: {{{HOPE}, {LINEAR}}}\n{choose}", tmp_path)
    assert then[0].choice.among == (first[0].name, f"hope-{first[2].name}")
    assert then[1].choice.twin == then[0].name == first[0].name
