"""A sweep whose trials are trained by a program that does what a plan says."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from hopescale.sweep.grid import load_sweep, make_trials
from hopescale.sweep.pool import run_trials
from tests.support.sweeps import THREE_TRIALS

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


@pytest.fixture
def trials(tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(THREE_TRIALS)
    return make_trials(load_sweep(tmp_path / "sweep.yaml"))


@pytest.fixture
def run(tmp_path: Path, trials, monkeypatch):
    """Run the trials with a program in place of training: `run(plan)` says what each start of a trial does."""
    fake = tmp_path / "fake"
    fake.write_text(textwrap.dedent(FAKE).strip().format(python=sys.executable))
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
