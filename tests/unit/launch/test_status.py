from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from hopescale.launch.ledger import LedgerEntry, entries, note, submit_again
from hopescale.launch.scheduler import Slurm
from hopescale.launch.status import elements_of_array, find_runs, run_status
from tests.support.fake_slurm import CONTROLLER_DOWN, NOT_KNOWN, record

PLAN = {"dp": 2, "tp": 2, "pp": 1, "total_sequences": 480, "global_batch_size": 8}

NO_WORD = "but the run does not say that it is done"


def entry(job: str = "7", **more) -> LedgerEntry:
    values = {"submitted": "2026-11-22T05:00:00+00:00", "cluster": "test", "nodes": 2, "ranks": 4}
    return LedgerEntry(job, **values | {"script": "submit.sbatch", "log": f"/runs/a/logs/{job}.log"} | more)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 20 of 60 that was submitted as job 7."""
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000015\n")
    (folder / "config.yaml").write_text("name: a\n")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    lines = [
        {"step": 10, "tokens_seen": 640, "time": 1.0, "loss": 2.5, "tps": 100.0, "time/step_s": 0.5},
        {"step": 20, "tokens_seen": 1280, "time": 2.0, "loss": None, "level/slow/updates": 1},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 2')
    note(folder, entry())
    return folder


def test_a_run_that_is_running(run: Path, fake):
    fake.answer("scontrol", record("7", "RUNNING", Restarts="2"))
    status = run_status(run, Slurm())
    assert (status.state, status.step, status.steps, status.tokens) == ("running", 20, 60, 1280)
    assert (status.loss, status.tps, status.eta_s) == (2.5, 400.0, 20.0)
    assert (status.job.restarts, status.checkpoint) == (2, "step-00000015")


def test_of_a_chain_the_job_counts_whose_turn_it_is(run: Path, fake):
    note(run, entry("8"))
    note(run, entry("9"))
    waiting = [record(job, "PENDING", Reason="Dependency") for job in ("8", "9")]
    fake.answer("scontrol", "\n".join([record("7", "RUNNING"), *waiting]))
    status = run_status(run, Slurm())
    assert (status.state, status.job.id, status.entry.job) == ("running", "7", "7")
    fake.answer("scontrol", "\n".join([record("7", "FAILED"), *waiting]))
    status = run_status(run, Slurm())
    assert (status.state, status.reason, status.entry.job) == ("waiting", "Dependency", "8")


@pytest.mark.parametrize(
    ("slurm", "outcome", "state", "reason"),
    [
        ({"state": "PENDING", "Reason": "BeginTime"}, "stopped by SIGUSR1 at step 20 of 60", "waiting", "BeginTime"),
        ({"state": "PENDING", "Reason": "Resources"}, "gave up: exit code 3", "waiting", "Resources"),
        ({"state": "COMPLETING"}, "stopped by SIGTERM at step 20 of 60", "running", None),
        ({"state": "FAILED"}, "gave up: exit code 3", "failed", "gave up: exit code 3"),
        ({"state": "FAILED", "Reason": "NonZeroExitCode"}, "", "failed", "FAILED NonZeroExitCode"),
        ({"state": "TIMEOUT", "Reason": "TimeLimit"}, "", "failed", "TIMEOUT TimeLimit"),
        ({"state": "CANCELLED"}, "stopped by SIGTERM at step 20 of 60", "cancelled", None),
        ({"state": "FAILED"}, "gave up: diverged, ever", "diverged", "gave up: diverged, ever"),
        ({"state": "COMPLETED"}, "done at step 60 of 60", "done", None),
        ({"state": "COMPLETED"}, "", "failed", f"COMPLETED, {NO_WORD}"),
        ({"state": "COMPLETED"}, "done", "failed", f"COMPLETED, {NO_WORD}"),
        ({"state": "COMPLETED"}, "done at step 39 of 60", "failed", f"COMPLETED, {NO_WORD}"),
        ({"state": "COMPLETED"}, "done at step 6 of 60", "failed", f"COMPLETED, {NO_WORD}"),
        ({"state": "COMPLETED"}, "paused at step 20 of 60", "stopped", "paused at step 20 of 60"),
        ({}, "", "failed", "Slurm has forgotten the job"),
        ({}, "stopped by SIGUSR1 at step 20 of 60", "stopped", "stopped by SIGUSR1 at step 20 of 60"),
    ],
)
def test_states(run: Path, fake, slurm: dict, outcome: str, state: str, reason: str | None):
    if slurm:
        fake.answer("scontrol", record("7", slurm.pop("state"), **slurm))
    else:
        fake.answer("scontrol", error=NOT_KNOWN, code=1)
    if outcome:
        (run / "outcome").write_text(f"{outcome}\n")
    status = run_status(run, Slurm())
    assert (status.state, status.reason) == (state, reason) and status.eta_s is None or state == "running"


def test_what_the_folder_knows_needs_no_slurm(run: Path, fake):
    fake.controller_down()
    assert run_status(run, Slurm()).state == "unknown"
    assert CONTROLLER_DOWN in run_status(run, Slurm()).reason
    (run / "outcome").write_text("gave up: exit code 2\n")
    assert run_status(run, Slurm()).state == "failed"
    asked = len(fake.calls("scontrol"))
    (run / "outcome").write_text("done at step 60 of 60\n")
    assert run_status(run, Slurm()).state == "done" and len(fake.calls("scontrol")) == asked


def test_failures_are_those_at_the_newest_checkpoint(run: Path, fake):
    fake.answer("scontrol", record("7", "FAILED", Reason="NonZeroExitCode"))
    lines = ["none exit code 9, job 7", "step-00000015 exit code 1, job 7", "step-00000015 exit code 137, job 7"]
    (run / "failures").write_text("".join(f"{line}\n" for line in lines))
    status = run_status(run, Slurm())
    assert status.failures == 2 and status.reason == f"FAILED NonZeroExitCode; {lines[-1]}"


def test_a_run_without_a_job(run: Path, fake):
    (run / "jobs.jsonl").unlink()
    assert run_status(run, Slurm()).state == "stopped"
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_status(run, Slurm()).state == "running"
    assert not fake.calls("scontrol")
    empty = run.parent / "empty"
    empty.mkdir()
    status = run_status(empty, Slurm())
    assert (status.state, status.step, status.steps) == ("stopped", None, None)


def test_runs_are_found_and_folders_of_arrays_are_not(run: Path, tmp_path: Path):
    sweep, element = tmp_path / "runs" / "sweep", tmp_path / "runs" / "sweep" / "trials" / "x"
    element.mkdir(parents=True)
    note(sweep, entry("9", elements=(("x", str(element)),)))
    note(element, entry("9_0"))
    (run / "code" / "hopescale").mkdir(parents=True)
    (run / "code" / "config.yaml").write_text("")
    (run / "code" / "plan.json").write_text("{}")
    assert find_runs(tmp_path / "runs") == [run, element]
    assert elements_of_array(sweep) == {"x": element} and elements_of_array(run) == {}


def test_files_of_other_programs_are_no_runs(run: Path, fake):
    other, damaged = run.parent / "other", run.parent / "damaged"
    for folder in (other, damaged):
        folder.mkdir()
        (folder / "jobs.jsonl").write_bytes(b'{"id": 3}\n[1]\n\xff\n')
    (damaged / "config.yaml").write_text("")
    (damaged / "plan.json").write_text("[]")
    (damaged / "outcome").write_bytes(b"\xff")
    assert find_runs(run.parent) == [run, damaged]
    assert run_status(damaged, Slurm()).state == "stopped"


def test_entries_survive_a_torn_line_and_more_keys(run: Path):
    with (run / "jobs.jsonl").open("a") as stream:
        stream.write(json.dumps({**vars(entry("8")), "later": 1}) + '\n{"job": "9')
    assert [found.job for found in entries(run)] == ["7", "8"]
    note(run, entry("10"))
    assert [found.job for found in entries(run)] == ["7", "8", "10"]


def test_a_job_is_submitted_again(run: Path, fake):
    fake.answer("sbatch", "12")
    again = submit_again(run, entries(run)[-1], Slurm())
    assert (again.job, again.log) == ("12", "/runs/a/logs/12.log") and entries(run)[-1] == again
    element = entry("9_3", script="/sweep/array-1/submit.sbatch", log="/sweep/9_runs/array-1/logs/9_3.log")
    again = submit_again(run, element, Slurm())
    assert (again.job, again.log) == ("12_3", "/sweep/9_runs/array-1/logs/12_3.log")
    assert fake.calls("sbatch") == [
        f"--parsable {run}/submit.sbatch",
        "--parsable --array=3 /sweep/array-1/submit.sbatch",
    ]
