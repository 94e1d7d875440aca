"""A sweep as a person runs it: killed half-way, continued, collected."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.sweeps import toy_sweep

ROOT = Path(__file__).parents[2]
SWEEP = toy_sweep([10, 400, 11], "checkpoint.every: 10")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path


def start(folder: Path) -> subprocess.Popen:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hopescale", "sweep", "run", "sweep.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environ, text=True, **pipes)


def steps_of(run_dir: Path) -> list[int]:
    metrics = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_without_repeating_a_finished_trial(hopescale, folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    trials = folder / "sweeps/toy/trials"
    first, second, third = (trials / f"steps{steps}" for steps in (10, 400, 11))
    pool = start(folder)
    try:
        wait_for(lambda: (second / "checkpoints/latest").exists() and len(steps_of(second)) > 15, pool)
    finally:
        pool.kill()
        pool.wait()
    record, written = (first / "metrics.jsonl").read_bytes(), (first / "metrics.jsonl").stat().st_mtime_ns
    assert not third.exists()

    pool = start(folder)
    out, _ = pool.communicate(timeout=400)
    assert pool.returncode == 0, out
    assert "steps400: started again (2 starts)" in out and "steps10: started" not in out
    assert (first / "metrics.jsonl").read_bytes() == record
    assert (first / "metrics.jsonl").stat().st_mtime_ns == written
    starts = [json.loads((run_dir / "trial.json").read_text())["starts"] for run_dir in (first, second, third)]
    assert starts == [1, 2, 1]
    assert steps_of(second) == list(range(401)), "each step once: what came after the checkpoint was cut and done again"
    assert "at step " in (second / "train.log").read_text()

    done = hopescale("sweep", "status", "sweep.yaml")
    assert done.code == 0 and "3 trials, 3 done" in done.out
    rows = list(csv.DictReader((folder / "sweeps/toy/points.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["done"] * 3 and all(float(row["loss"]) > 0 for row in rows)
    assert hopescale("sweep", "run", "sweep.yaml").out == "sweeps/toy: 3 trials, 3 done\n"
    assert (folder / "sweeps/toy/sweep.yaml").read_text() == SWEEP


def test_a_signal_stops_the_trial_and_the_sweep(folder: Path):
    pool = start(folder)
    second = folder / "sweeps/toy/trials/steps400"
    try:
        wait_for(lambda: len(steps_of(second)) > 2, pool)
        pool.send_signal(signal.SIGTERM)
        out, _ = pool.communicate(timeout=100)
    finally:
        pool.kill()
    assert pool.returncode == 75 and "SIGTERM: 2 of 3 trials are not done" in out
    assert json.loads((second / "trial.json").read_text())["state"] == "stopped"
    assert (second / "checkpoints/latest").exists()


def test_plan_shows_every_trial_and_what_is_wrong_with_any(hopescale, folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    done = hopescale("sweep", "plan", "sweep.yaml")
    assert done.code == 0 and done.out.count("steps") >= 3 and "3 trials" in done.out
    (folder / "sweep.yaml").write_text(SWEEP + "sizes: {odd: {model.d_model: 15}}\n")
    done = hopescale("sweep", "plan", "sweep.yaml")
    assert done.code == 2 and "trial odd-steps10 and 2 more" in done.err
    assert hopescale("sweep", "collect", "sweep.yaml").code == 2
    assert not (folder / "sweeps").exists()
    (folder / "sweep.yaml").write_text(SWEEP)
    done = hopescale("sweep", "collect", "sweep.yaml")
    assert done.code == 5 and "hopescale sweep run" in done.err
