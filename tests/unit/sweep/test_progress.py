"""How trials stand, by their folders; what may not change while they run; the table of their results."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest

from hopescale.checkpoint.manifest import Manifest, to_json
from hopescale.common.errors import ConfigError, DataError, LaunchError
from hopescale.config.load import to_yaml
from hopescale.data.identity import fingerprint_here
from hopescale.sweep.collect import collect
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.progress import NOTE, as_trained, read_note, require_same, trial_folder, trial_status
from tests.support.sweeps import THREE_TRIALS

RATES = ["batch", "lr"]


def test_points_hold_a_row_for_every_trial(run, trials, tmp_path: Path):
    run({"steps4": ["6"]})
    path = collect(trials, tmp_path / "out")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert list(rows[0]) == ["trial", "series", "train.steps", "N", "D", "FLOP", "loss", "loss_from", "state", *RATES]
    assert [row["state"] for row in rows] == ["done", "diverged", "done"]
    assert [row["loss"] for row in rows] == ["2.750000", "", "2.500000"]
    assert rows[2]["loss_from"] == "val/main" and rows[1]["loss_from"] == ""
    checkpoints = tmp_path / "out/trials/steps5/checkpoints"
    (checkpoints / "step-00000005").mkdir(parents=True)
    (checkpoints / "latest").write_text("step-00000005\n")
    manifest = Manifest({"step": 5, "recovery": {"rate_factor": 0.25}}, {}, {})
    (checkpoints / "step-00000005/manifest.json").write_text(to_json(manifest))
    again = list(csv.DictReader(collect(trials, tmp_path / "out").read_text().splitlines()))
    assert [row["rate_factor"] for row in again] == ["1", "1", "0.25"]
    assert [int(row["D"]) for row in rows] == [trial.tokens for trial in trials]
    assert int(rows[0]["FLOP"]) == trials[0].flops and int(rows[0]["N"]) == trials[0].params


def test_without_held_out_text_the_loss_is_the_mean_of_the_last_records(tmp_path: Path):
    lines = [{"step": step, "loss": float(step)} for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (trial_status(tmp_path).loss, trial_status(tmp_path).source) == (20.0, "train")
    (tmp_path / "outcome").write_text("done at step 20 of 20\n")
    assert (trial_status(tmp_path).loss, trial_status(tmp_path).source) == (15.5, "train, mean of 10")


def test_a_trial_that_has_begun_counts_with_the_config_it_was_trained_with(trials, tmp_path: Path):
    folder = trial_folder(tmp_path, trials[0])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(trials[1].config))
    first, second, _ = as_trained(trials, tmp_path)
    assert (first.name, first.steps, first.tokens) == (trials[0].name, trials[1].steps, trials[1].tokens)
    assert second == trials[1]


def test_a_job_that_gave_up_has_diverged_or_failed_by_its_word(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    (tmp_path / "outcome").write_text("gave up: diverged, which another start would repeat\n")
    assert trial_status(tmp_path).state == "diverged"
    (tmp_path / "outcome").write_text("gave up: 3 failures in a row\n")
    assert trial_status(tmp_path).state == "failed"
    (tmp_path / "metrics.jsonl").unlink()
    assert trial_status(tmp_path).state == "failed", "also before its first record"


def test_states_of_trials_that_another_machine_runs(tmp_path: Path):
    assert trial_status(tmp_path / "none").state == "waiting"
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    assert trial_status(tmp_path).state == "running"
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert trial_status(tmp_path).state == "stopped"
    (tmp_path / NOTE).write_text('{"state": "running", "host": "elsewhere", "pid": 1}')
    assert trial_status(tmp_path).state == "stopped"
    (tmp_path / NOTE).write_text('{"state": "failed"}')
    assert trial_status(tmp_path).state == "failed"
    os.utime(tmp_path / "metrics.jsonl", (time.time() + 1, time.time() + 1))
    assert trial_status(tmp_path).state == "running"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"state": "done", "colour": 1}', "null", '{"state": "running", "pid": "x"}']
)
def test_a_damaged_note_is_told_of_its_trial_alone(tmp_path: Path, content: str):
    (tmp_path / NOTE).write_text(content)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    status = trial_status(tmp_path)
    assert (status.state, status.step, status.loss) == ("unknown", 3, 2.0) and "cannot be read" in status.reason
    with pytest.raises(LaunchError, match="cannot be read"):
        read_note(tmp_path)
    (tmp_path / "outcome").write_text("done at step 3 of 3\n")
    assert trial_status(tmp_path).state == "done"


def test_a_sweep_that_changed_since_its_trials_began_is_refused(run, trials, tmp_path: Path):
    (tmp_path / "out/trials/steps3").mkdir()
    (tmp_path / "out/trials/steps3/config.yaml").write_text(to_yaml(trials[0].config))
    sweep = load_sweep(tmp_path / "sweep.yaml")
    require_same(sweep, trials, tmp_path / "out")
    (tmp_path / "sweep.yaml").write_text(THREE_TRIALS + "set: {optim.lr: 0.5}\n")
    with pytest.raises(ConfigError) as caught:
        require_same(sweep, make_trials(load_sweep(tmp_path / "sweep.yaml")), tmp_path / "out")
    assert "trial steps3" in str(caught.value) and "-> 0.5" in str(caught.value)


def test_a_sweep_s_data_may_lie_elsewhere(tmp_path: Path):
    def sweep_on(path: Path):
        data = f"set: {{data.sources.markov: null, data.sources.main.path: {path}, train.seq_len: 64}}\n"
        (tmp_path / "sweep.yaml").write_text(THREE_TRIALS + data)
        return load_sweep(tmp_path / "sweep.yaml")

    for name in ("data", "copy", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("other" if name == "other" else "same")
    trials = make_trials(sweep_on(tmp_path / "data"))
    (tmp_path / "out/trials/steps3").mkdir(parents=True)
    (tmp_path / "out/trials/steps3/config.yaml").write_text(to_yaml(trials[0].config))
    for path in (tmp_path / "copy", tmp_path / "x" / ".." / "data"):
        (tmp_path / "x").mkdir(exist_ok=True)
        sweep = sweep_on(path)
        require_same(sweep, make_trials(sweep), tmp_path / "out")
    sweep = sweep_on(tmp_path / "other")
    with pytest.raises(ConfigError, match=r'data\.sources\.main\.path: .*/data" -> .*/other"'):
        require_same(sweep, make_trials(sweep), tmp_path / "out")


def test_text_that_was_replaced_while_a_sweep_ran_is_refused(tmp_path: Path):
    index, run_dir = tmp_path / "data" / "index.json", tmp_path / "out/trials/steps3"
    data = f"set: {{data.sources.markov: null, data.sources.main.path: {index.parent}, train.seq_len: 64}}\n"
    (tmp_path / "sweep.yaml").write_text(THREE_TRIALS + data)
    sweep = load_sweep(tmp_path / "sweep.yaml")
    trials = make_trials(sweep)
    index.parent.mkdir()
    index.write_text("old")
    (run_dir / "checkpoints/step-00000003").mkdir(parents=True)
    (run_dir / "checkpoints/latest").write_text("step-00000003\n")
    identity = {"data": fingerprint_here(trials[0].config.data, 64)}
    manifest = Manifest({"step": 3}, {}, identity)
    (run_dir / "checkpoints/step-00000003/manifest.json").write_text(to_json(manifest))
    require_same(sweep, trials, tmp_path / "out")
    index.write_text("new")
    with pytest.raises(DataError, match="data is not the one that trial steps3 has read"):
        require_same(sweep, trials, tmp_path / "out")
    index.unlink()
    require_same(sweep, trials, tmp_path / "out")
