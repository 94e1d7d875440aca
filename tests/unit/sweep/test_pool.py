from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hopescale.checkpoint.manifest import Manifest, to_json
from hopescale.common.errors import ConfigError, DataError, LaunchError, StoppedEarly
from hopescale.config.load import to_yaml
from hopescale.data.identity import fingerprint_here
from hopescale.sweep.collect import collect
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.pool import locked, run_trials
from hopescale.sweep.progress import (
    NOTE,
    as_trained,
    read_note,
    require_same,
    status_in_sweep,
    trial_folder,
    trial_status,
)
from hopescale.sweep.trial import Trial

PYTHON = sys.executable

FAKE = '''
#!{python}
"""Stands for `python -m hopescale train ... --run-dir DIR`: does what `plan.json` beside the trials says."""
import fcntl, json, os, signal, sys, time
from pathlib import Path
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
steps = int(next(word for word in sys.argv if word.startswith("train.steps=")).partition("=")[2])
lock = (run_dir / ".lock").open("w")
fcntl.flock(lock, fcntl.LOCK_EX)
with (run_dir.parent / "calls").open("a") as calls:
    calls.write(run_dir.name + "\\n")
acts = json.loads((run_dir.parent / "plan.json").read_text()).get(run_dir.name, ["done"])
count = (run_dir.parent / "calls").read_text().split().count(run_dir.name)
act = acts[min(count, len(acts)) - 1]
metrics = run_dir / "metrics.jsonl"
def record(step, **values):
    with metrics.open("a") as file:
        file.write(json.dumps({{"step": step, "tokens_seen": step, "time": 0, **values}}) + "\\n")
if act == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    record(1, loss=3.0)
    time.sleep(60)
kept = next((word.partition("=")[2] for word in sys.argv if word.startswith("checkpoint.keep_at=")), "[]")
for step in json.loads(kept) if act == "done" else []:
    (run_dir / f"checkpoints/step-{{step:08d}}").mkdir(parents=True)
    (run_dir / f"checkpoints/step-{{step:08d}}/manifest.json").write_text("")
if act == "done":
    for step in range(1, steps + 1):
        record(step, loss=4.0 - step / steps, tps=7.0)
    record(steps, **{{"val/main/loss": 2.5 if steps > 3 else 2.75}})
    (run_dir / "outcome").write_text(f"done at step {{steps}} of {{steps}}\\n")
elif act == "0":
    record(steps, loss=3.0)
    sys.exit(0)
elif act == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    print("diverged\\n  step 2: the loss is nan\\n    hint: lower it" if act == "6" else "error\\n  no more room")
    sys.exit(int(act))
'''

SWEEP = "name: toy\nrecipe: debug\naxes: {train.steps: [3, 4, 5]}\n"


@pytest.fixture
def trials(tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_trials(load_sweep(tmp_path / "sweep.yaml"))


@pytest.fixture
def run(tmp_path: Path, trials, monkeypatch):
    """Run the trials with a program in place of training: `run(plan)` says what each start of a trial does."""
    fake = tmp_path / "fake"
    fake.write_text(textwrap.dedent(FAKE).strip().format(python=PYTHON))
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    (tmp_path / "out" / "trials").mkdir(parents=True)
    said = []

    def start(plan: dict[str, list[str]], jobs: int = 1, retries: int = 1) -> list[str]:
        (tmp_path / "out/trials/plan.json").write_text(json.dumps(plan))
        said.clear()
        quiet = {"report": said.append, "show": lambda: None}
        run_trials(trials, tmp_path / "out", jobs=jobs, retries=retries, environ=os.environ, **quiet)
        return said

    return start


def states(trials, tmp_path: Path) -> list[str]:
    return [trial_status(trial_folder(tmp_path / "out", trial)).state for trial in trials]


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "out/trials/calls").read_text().split()


def test_what_is_done_is_not_started_again(run, trials, tmp_path: Path):
    said = run({})
    assert said[0] == "steps3: started" and said[1].startswith("steps3: done, loss 2.7500 (val/main), ")
    assert states(trials, tmp_path) == ["done"] * 3 and calls(tmp_path) == ["steps3", "steps4", "steps5"]
    assert run({}) == [] and len(calls(tmp_path)) == 3


def test_failed_trials_are_tried_again_and_diverged_ones_are_not(run, trials, tmp_path: Path):
    said = run({"steps3": ["killed", "done"], "steps4": ["6"]})
    assert calls(tmp_path).count("steps3") == 2 and calls(tmp_path).count("steps4") == 1
    assert "steps3: failed: died with SIGKILL" in said and "steps3: started again (2 starts)" in said
    assert "steps4: diverged: step 2: the loss is nan (exit code 6)" in said
    assert states(trials, tmp_path) == ["done", "diverged", "done"]
    assert run({}) == []


def test_a_trial_that_keeps_failing_ends_the_sweep_in_an_error_after_the_others(run, trials, tmp_path: Path):
    plan = {"steps3": ["1"], "steps4": ["2"]}
    with pytest.raises(LaunchError) as caught:
        run(plan, retries=2)
    assert calls(tmp_path).count("steps3") == 3 and calls(tmp_path).count("steps4") == 1
    assert "2 of 3 trials failed" in str(caught.value) and "no more room (exit code 1)" in str(caught.value)
    assert str(tmp_path / "out/trials/steps3/train.log") in str(caught.value)
    assert states(trials, tmp_path) == ["failed", "failed", "done"]
    assert trial_status(tmp_path / "out/trials/steps3").reason == "no more room (exit code 1)"
    run({"steps3": ["done"], "steps4": ["done"]})
    assert states(trials, tmp_path) == ["done"] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_trials_in_order(run, trials, tmp_path: Path, number: int):
    waiting = {"steps3": ["done"], "steps4": ["wait", "done"], "steps5": ["wait", "done"]}

    def interrupt() -> None:
        while not all((tmp_path / f"out/trials/steps{n}/metrics.jsonl").exists() for n in (3, 4, 5)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(StoppedEarly, match="2 of 3 trials are not done"):
        run(waiting, jobs=2)
    thread.join()
    assert states(trials, tmp_path) == ["done", "stopped", "stopped"]
    run(waiting, jobs=2)
    assert states(trials, tmp_path) == ["done"] * 3
    assert calls(tmp_path).count("steps3") == 1 and read_note(tmp_path / "out/trials/steps4").starts == 2


def test_a_trial_whose_folder_is_still_held_is_waited_for(run, trials, tmp_path: Path):
    folder = tmp_path / "out/trials/steps3"
    folder.mkdir()
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); time.sleep(60)"
    command = [PYTHON, "-c", hold, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        threading.Timer(1.0, holder.kill).start()
        said = run({})
    assert "steps3: waiting for a process that still trains it" in said
    assert calls(tmp_path) == ["steps4", "steps5", "steps3"]


def test_a_sweep_folder_is_one_processs(tmp_path: Path):
    with locked(tmp_path / "out"), pytest.raises(LaunchError, match="in use by another"), locked(tmp_path / "out"):
        pass


def test_what_goes_wrong_while_a_folder_is_held_is_not_said_of_the_folder(tmp_path: Path):
    with pytest.raises(BrokenPipeError), locked(tmp_path / "out"):
        raise BrokenPipeError
    with locked(tmp_path / "out"):
        pass


def test_ranks_of_a_trial_follow_from_its_degrees(run, tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text("recipe: debug\nset: {parallel.tp: 2, train.steps: 3}\n")
    trials = make_trials(load_sweep(tmp_path / "sweep.yaml"))
    (tmp_path / "out/trials/plan.json").write_text("{}")
    quiet = {"report": lambda line: None, "show": lambda: None}
    run_trials(trials, tmp_path / "out", jobs=1, retries=0, environ=os.environ, **quiet)
    words = (tmp_path / "out/trials/trial/train.log").read_text().split()
    assert words[-2:] == ["--nproc", "2"] and "parallel.tp=2" in words


BRANCHES = """
recipe: debug
set: {optim.schedule.name: wsd, optim.schedule.warmup_steps: 2}
tokens: [20Ki, 40Ki, 60Ki]
branch: true
"""


def branches(tmp_path: Path) -> list[Trial]:
    (tmp_path / "sweep.yaml").write_text(BRANCHES)
    return make_trials(load_sweep(tmp_path / "sweep.yaml"))


@pytest.fixture
def run_branches(run, tmp_path: Path):
    """Run three horizons of one size, of which the two shorter ones branch off the longest, two at a time."""
    trials, said = branches(tmp_path), []

    def start(plan: dict[str, list[str]]) -> list[str]:
        (tmp_path / "out/trials/plan.json").write_text(json.dumps(plan))
        quiet = {"report": said.append, "show": lambda: None}
        run_trials(trials, tmp_path / "out", jobs=2, retries=0, environ=os.environ, **quiet)
        return said

    return start


def test_branches_wait_for_their_trunk(run_branches, tmp_path: Path):
    run_branches({})
    assert sorted(calls(tmp_path)) == ["d20Ki", "d40Ki", "d60Ki"] and calls(tmp_path)[0] == "d60Ki"
    words = (tmp_path / "out/trials/d40Ki/train.log").read_text().split()
    place = words.index("--branch-from") + 1
    assert words[place] == str(tmp_path / "out/trials/d60Ki/checkpoints/step-00000032")
    run_branches({})
    assert len(calls(tmp_path)) == 3


@pytest.mark.parametrize(("ends", "state"), [("6", "diverged"), ("1", "failed")])
def test_branches_end_with_a_trunk_that_does_not_come_to_their_step(run_branches, tmp_path: Path, ends, state):
    if state == "failed":
        with pytest.raises(LaunchError, match="its trunk d60Ki is failed, and holds no step-00000016"):
            run_branches({"d60Ki": [ends]})
    else:
        assert "d20Ki: diverged: its trunk d60Ki diverged before step 16" in run_branches({"d60Ki": [ends]})
    assert calls(tmp_path) == ["d60Ki"]
    assert [status_in_sweep(trial, tmp_path / "out").state for trial in branches(tmp_path)] == [state] * 3


def test_branches_of_a_trunk_that_diverged_begin_when_it_is_tried_again(run_branches, tmp_path: Path):
    run_branches({"d60Ki": ["6"]})
    shutil.rmtree(tmp_path / "out/trials/d60Ki")
    run_branches({})
    assert sorted(calls(tmp_path)) == ["d20Ki", "d40Ki", "d60Ki", "d60Ki"]
    assert {status_in_sweep(trial, tmp_path / "out").state for trial in branches(tmp_path)} == {"done"}


CHOICE = "recipe: debug\naxes: {train.steps: [3, 4], train.seed: [0, 1]}\nchoose: train.steps\n"


def test_a_choice_lets_the_best_value_go_on_alone(run, tmp_path: Path):
    """The program that stands for training ends with a loss of 2.75 after 3 steps, and of 2.5 after 4."""
    (tmp_path / "sweep.yaml").write_text(CHOICE)
    trials, folder = make_trials(load_sweep(tmp_path / "sweep.yaml")), tmp_path / "out"
    quiet = {"report": lambda line: None, "show": lambda: None}
    plan = tmp_path / "out/trials/plan.json"
    plan.write_text(json.dumps({"steps3-seed0": ["1", "done"]}))
    with pytest.raises(LaunchError, match="steps3-seed1/train.log: waits for a choice among"):
        run_trials(trials, folder, jobs=1, retries=0, environ=os.environ, **quiet)
    assert calls(tmp_path) == ["steps3-seed0", "steps4-seed0"]
    run_trials(trials, folder, jobs=1, retries=0, environ=os.environ, **quiet)
    assert calls(tmp_path)[2:] == ["steps3-seed0", "steps4-seed1"]
    rows = list(csv.DictReader(collect(trials, folder).read_text().splitlines()))
    assert [row["state"] for row in rows] == ["done", "left out", "done", "done"]
    assert [row["chosen"] for row in rows] == ["no", "no", "yes", "yes"] and "score" not in rows[0]


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


def test_a_trial_that_ends_without_its_word_has_failed(run, trials, tmp_path: Path):
    with pytest.raises(LaunchError, match="ended with exit code 0 before its last step"):
        run({"steps3": ["0"]}, retries=0)
    assert states(trials, tmp_path) == ["failed", "done", "done"]


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
    (tmp_path / "sweep.yaml").write_text(SWEEP + "set: {optim.lr: 0.5}\n")
    with pytest.raises(ConfigError) as caught:
        require_same(sweep, make_trials(load_sweep(tmp_path / "sweep.yaml")), tmp_path / "out")
    assert "trial steps3" in str(caught.value) and "-> 0.5" in str(caught.value)


def test_a_sweep_s_data_may_lie_elsewhere(tmp_path: Path):
    def sweep_on(path: Path):
        data = f"set: {{data.sources.markov: null, data.sources.main.path: {path}, train.seq_len: 64}}\n"
        (tmp_path / "sweep.yaml").write_text(SWEEP + data)
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
    (tmp_path / "sweep.yaml").write_text(SWEEP + data)
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
