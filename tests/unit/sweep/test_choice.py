from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError, DataError
from hopescale.observe.run_status import DIVERGED, DONE, FAILED, WAITING
from hopescale.sweep.choice import best_of, spent_on
from hopescale.sweep.finished import expand
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.score import score
from hopescale.sweep.trial import TrialChoice

SWEEP = """
series: {a: {recipe: debug}, b: {recipe: debug, set: {train.steps: 50}}}
axes: {optim.lr: [1e-3, 3e-3, 1e-2], train.seed: [0, 1, 2]}
choose: optim.lr
"""


@pytest.fixture
def make(tmp_path: Path):
    """Make the trials of a sweep from its text."""

    def of(text: str):
        (tmp_path / "sweep.yaml").write_text(text)
        return make_trials(load_sweep(tmp_path / "sweep.yaml"))

    return of


def test_each_series_chooses_with_the_first_value_of_the_other_axes(make):
    trials = {trial.name: trial for trial in make(SWEEP)}
    assert len(trials) == 18
    candidates = [name for name, trial in trials.items() if trial.is_candidate]
    assert candidates == [f"{series}-lr{rate}-seed0" for series in "ab" for rate in ("0.001", "0.003", "0.01")]
    assert trials["b-lr0.003-seed2"].choice == TrialChoice(tuple(candidates[3:]), "b-lr0.003-seed0")
    choosing, following, number = spent_on(list(trials.values()))
    assert number == 4 and following == choosing * 2 / 3


@pytest.mark.parametrize(
    ("ends", "best"),
    [
        ([(DONE, 2.0), (DONE, 1.0), (DONE, 3.0)], "y"),
        ([(DONE, 2.0), (DIVERGED, 0.5), (DONE, None)], "x"),
        ([(DIVERGED, None)] * 3, "x"),
        ([(DONE, 2.0), (DONE, 1.0), (WAITING, None)], None),
        ([(DONE, 2.0), (FAILED, 1.0), (DONE, 3.0)], None),
    ],
)
def test_the_best_of_those_that_are_done_is_chosen_once_none_goes_on(ends, best: str | None):
    assert best_of(TrialChoice(("x", "y", "z"), "x"), dict(zip("xyz", ends, strict=True))) == best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("choose: optim.lr", "choose: train.steps"), "train.steps is no axis"),
        (("[1e-3, 3e-3, 1e-2]", "[1e-3]"), "optim.lr has one value"),
        ((", train.seed: [0, 1, 2]", ""), "no other axis has more than one value"),
    ],
)
def test_a_choice_without_effect_is_refused(make, change, message: str):
    with pytest.raises(ConfigError) as caught:
        make(SWEEP.replace(*change))
    assert {problem.key for problem in caught.value.problems} == {"choose"} and message in str(caught.value)


def test_the_score_is_of_the_last_step_and_says_what_was_asked(tmp_path: Path):
    """The newest evaluation is of an earlier checkpoint, those of other settings are told apart."""
    points = [{"task": "mqar", "settings": {"pairs": n}, "examples": 9, "accuracy": n / 10} for n in (2, 4)]
    found = {}
    for run, body in {
        "whole": {"step": 9, "suites": points},
        "alike": {"step": 9, "suites": [point | {"accuracy": 1.0} for point in points]},
        "one": {"step": 9, "suites": points[:1]},
        "adapted": {"step": 9, "suites": points, "settings": {"adapt": {"fast": 512}, "limit": None}},
        "early": {"step": 8, "suites": points},
        "tasks": {"step": 9, "suites": []},
    }.items():
        (tmp_path / run / "evals").mkdir(parents=True)
        (tmp_path / run / "evals" / "step-00000009.1.json").write_text(json.dumps(body))
        early = tmp_path / run / "evals" / "step-00000008.1.json"
        early.write_text(json.dumps({"step": 8, "suites": points[:1]}))
        os.utime(early, (2e9, 2e9))
        found[run] = score(tmp_path / run, 9)
    assert found["early"] is found["tasks"] is None and found["whole"].value == pytest.approx(0.3)
    assert found["whole"].source == found["alike"].source and found["whole"].source.startswith("mqar, 2 points, ")
    assert "adapt" in found["adapted"].source
    assert len({found[run].source for run in ("whole", "one", "adapted")}) == 3


def test_a_sweep_s_folder_stands_for_its_chosen_trials(tmp_path: Path):
    table = "trial,state,chosen\na,done,no\nb,done,yes\nc,left out,no\nd,done,\ne,diverged,yes\n"
    (tmp_path / "points.csv").write_text(table)
    other = tmp_path / "run"
    trials = tmp_path / "trials"
    assert expand([other, tmp_path]) == [other, trials / "b", trials / "d"]
    with pytest.raises(DataError, match="no trial of .* was asked"):
        expand([tmp_path], evaluated=True)
    (trials / "d/evals").mkdir(parents=True)
    (trials / "d/evals/step-00000001.1.json").write_text('{"suites": []}')
    assert expand([tmp_path], evaluated=True) == [trials / "d"]
    (tmp_path / "points.csv").write_text("name\na\n")
    with pytest.raises(DataError, match="is no table of a sweep"):
        expand([tmp_path])
