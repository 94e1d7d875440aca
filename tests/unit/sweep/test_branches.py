from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError
from hopescale.optim.schedule import learning_rate
from hopescale.sweep.branches import saving
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.progress import branch_checkpoint, can_start, status_in_sweep, trial_folder
from hopescale.sweep.stages import make_stages
from hopescale.sweep.trial import Branch, Trial

SWEEP = """
recipe: debug
set: {optim.schedule.name: wsd, optim.schedule.warmup_steps: 2}
sizes: {w32: {model.d_model: 32}, w64: {model.d_model: 64}}
tokens: [50Ki, 100Ki, 200Ki, 400Ki]
branch: true
"""
DECAY_ALONE = "warmup_steps: 0, optim.schedule.decay_fraction: 1"
SMALL = SWEEP.replace(", w64: {model.d_model: 64}", "").replace(", 200Ki, 400Ki", "")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Two sizes with four horizons each."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(SWEEP)
    return make_trials(load_sweep(path))


@pytest.fixture
def make(tmp_path: Path):
    """Make the trials of a sweep from its text."""

    def of(text: str) -> list[Trial]:
        (tmp_path / "sweep.yaml").write_text(text)
        return make_trials(load_sweep(tmp_path / "sweep.yaml"))

    return of


def test_shorter_horizons_branch_off_the_longest_where_their_decay_begins(trials):
    assert [trial.branch for trial in trials[4:]] == [*(Branch("w64-d400Ki", step) for step in (40, 80, 160)), None]
    assert trials[3].config.checkpoint.keep_at == (40, 80, 160) and trials[0].config.checkpoint.keep_at == ()
    assert trials[3].overrides[-1] == "checkpoint.keep_at=[40,80,160]"
    for trial in trials[:3]:
        schedule = trial.config.optim.schedule
        rates = [[learning_rate(step, 1.0, t.steps, schedule) for step in range(1, 401)] for t in (trial, trials[3])]
        step = trial.branch.step
        assert rates[0][:step] == rates[1][:step] and rates[0][step] < rates[1][step]


def test_one_trunk_and_four_decays_cost_less_than_four_runs(trials):
    spent, apart = saving(trials)
    assert spent / apart == pytest.approx(9.4 / 15)


@pytest.mark.parametrize("name", ["hope_laws", "hope_laws_rates"])
def test_shipped_sweeps_branch(name: str):
    """One size of one series with its shortest and longest horizon; the others are alike."""
    sweep = load_sweep(Path(name))
    flops, axes = sweep.config.flops, {key: values[:1] for key, values in sweep.config.axes.items()}
    sizes = {"w16": sweep.config.sizes["w16"]}
    few = {"sizes": sizes, "flops": (flops[0], flops[-1]), "axes": axes}
    few["series"] = {"hope_linear": sweep.config.series["hope_linear"]}
    made = make_trials(replace(sweep, config=replace(sweep.config, **few)))
    assert [trial.branch is None for trial in made] == [False, True]
    assert {trial.config.optim.schedule.name for trial in made} == {"wsd"}
    own = made[0].config.optim.schedule.decay_fraction
    spent = flops[-1] + own * sum(flops[:-1])
    assert len(flops) < 5 or spent / sum(flops) < 0.63


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (("name: wsd, ", "name: cosine, "), "optim.schedule.name", "is cosine"),
        (("branch: true", "branch: true\nrules: {optim.lr: 0.1 / steps}"), "optim.lr", "would share a run, but differ"),
        (
            ("schedule.warmup_steps: 2", "schedule.warmup_steps: 0, optim.schedule.decay_fraction: 1"),
            "optim.schedule.decay_fraction",
            "no step before its decay",
        ),
        (
            ("schedule.warmup_steps: 2", "schedule.warmup_steps: 50"),
            "optim.schedule.warmup_steps",
            "50 leaves w32-d50Ki, of 50 steps, none to decay",
        ),
        (
            ("schedule.warmup_steps: 2", "schedule.warmup_steps: 2, optim.schedule.decay_fraction: 0.009"),
            "optim.schedule.decay_fraction",
            "0.009 leaves w32-d50Ki, of 50 steps, none to decay",
        ),
        (("tokens: [50Ki, 100Ki]", ""), "branch", "no horizons"),
    ],
)
def test_horizons_that_cannot_share_a_run_are_refused(make, change, key: str, message: str):
    with pytest.raises(ConfigError) as caught:
        make(SMALL.replace(*change))
    assert {problem.key for problem in caught.value.problems} == {key} and message in str(caught.value)


def test_stages_of_jobs_train_a_trunk_in_parts_and_branches_after_them(trials, tmp_path: Path):
    stages = make_stages(trials, tmp_path)
    assert [after for _, after in stages] == [None, 0, 0, 2, 2, 4, 4]
    names = [[start.trial.name.partition("-")[2] for start in starts.values()] for starts, _ in stages]
    trunk = ["d400Ki"] * 2
    assert names == [trunk, ["d50Ki"] * 2, trunk, ["d100Ki"] * 2, trunk, ["d200Ki"] * 2, trunk]
    assert [starts[1].words[-2:] for starts, _ in stages[:5:2]] == [("--stop-at", step) for step in ("40", "80", "160")]
    assert "--stop-at" not in stages[6][0][0].words

    for step in (40, 80):
        folder = branch_checkpoint(trial_folder(tmp_path, trials[0]), Branch("w32-d400Ki", step))
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("")
    trial_folder(tmp_path, trials[0]).mkdir()
    (trial_folder(tmp_path, trials[0]) / "outcome").write_text("done at step 50 of 50\n")
    starts = [list(starts) for starts, _ in make_stages(trials, tmp_path)]
    assert starts == [[1], [1], [1], [0, 1], [0, 1], [0, 1], [0, 1]], "of the first size only what is left"


def trained(folder: Path, steps: range, outcome: str) -> None:
    """Write the record of a run without held-out text, whose loss is the step."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "outcome").write_text(outcome + "\n")


@pytest.mark.parametrize(
    ("outcome", "state", "reason"),
    [
        ("gave up: diverged, which another start would repeat", "diverged", "its trunk w32-d100Ki diverged before"),
        ("gave up: 3 failures in a row", "failed", "its trunk w32-d100Ki is failed, and holds no step-00000040"),
        ("done at step 100 of 100", "failed", "its trunk w32-d100Ki is done, and holds no step-00000040"),
        ("stopped by SIGTERM at step 20 of 100", "waiting", None),
    ],
)
def test_a_branch_ends_with_a_trunk_that_ended_as_a_job(make, tmp_path: Path, outcome: str, state: str, reason):
    branch, trunk = make(SMALL)
    trained(trial_folder(tmp_path, trunk), range(1, 20), outcome)
    os.utime(trial_folder(tmp_path, trunk) / "metrics.jsonl", (0, 0))
    status = status_in_sweep(branch, tmp_path)
    assert status.state == state and (status.reason or "").startswith(reason or "")
    over = state == "diverged" or "done" in outcome
    assert [list(starts) for starts, _ in make_stages([branch, trunk], tmp_path)][-1] == ([] if over else [0])


def test_a_branch_that_has_begun_needs_its_trunk_no_more(make, tmp_path: Path):
    branch, _ = make(SMALL)
    run_dir = trial_folder(tmp_path, branch)
    assert not can_start(run_dir, branch)
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "latest").write_text("step-00000045\n")
    assert can_start(run_dir, branch)


def test_the_loss_of_a_branch_is_that_of_its_own_run(make, tmp_path: Path):
    branch, trunk = make(SMALL)
    trained(trial_folder(tmp_path, trunk), range(1, 100), "done at step 100 of 100")
    trained(trial_folder(tmp_path, branch), range(45, 51), "done at step 50 of 50")
    status = status_in_sweep(branch, tmp_path)
    mean = (sum(range(37, 41)) + sum(range(45, 51))) / 10
    assert (status.loss, status.source) == (pytest.approx(mean), "train, mean of 10")
