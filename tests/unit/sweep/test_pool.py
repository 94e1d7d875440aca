from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hopescale.common.errors import LaunchError, StoppedEarly
from hopescale.sweep.collect import collect
from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.pool import locked, run_trials
from hopescale.sweep.progress import read_note, status_in_sweep, trial_status
from hopescale.sweep.trial import Trial
from tests.support.sweeps import calls, states

PYTHON = sys.executable
"""The interpreter itself; while trials run, the program in their place has its name."""


def test_a_trial_that_ends_without_its_word_has_failed(run, trials, tmp_path: Path):
    with pytest.raises(LaunchError, match="ended with exit code 0 before its last step"):
        run({"steps3": ["0"]}, retries=0)
    assert states(trials, tmp_path) == ["failed", "done", "done"]


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
