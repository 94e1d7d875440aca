from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest

from hopescale.cli.app import main
from hopescale.launch.ledger import LedgerEntry, entries, note
from tests.support.fake_slurm import FakeSlurm, record

PLAN = {"dp": 2, "tp": 1, "pp": 1, "total_sequences": 480, "global_batch_size": 8}


@pytest.fixture
def hopescale(capsys):
    def call(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out + err

    return call


@pytest.fixture
def run(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    (folder / "logs").mkdir(parents=True)
    for name, text in {"config.yaml": "name: a\n", "plan.json": json.dumps(PLAN)}.items():
        (folder / name).write_text(text)
    line = {"step": 20, "tokens_seen": 1280, "time": 2.0, "loss": 2.5, "tps": 100.0, "time/step_s": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    log = folder / "logs" / "7.log"
    log.write_text("job starts\n" + "".join(f"{n % 12:2}: line {n}\n" for n in range(60)))
    note(folder, LedgerEntry("7", "2026-11-22T05:00:00+00:00", "test", 2, 2, "submit.sbatch", str(log)))
    fake.answer("scontrol", record("7", "RUNNING", Restarts="2", NodeList="node[1-2]"))
    return folder


def test_list_and_status(hopescale, fake, run):
    other = run.parent / "b"
    other.mkdir()
    note(other, LedgerEntry("8", "2026-11-22T05:00:00+00:00", "test", 1, 1, "submit.sbatch", "x.log"))
    code, out = hopescale("jobs", "list")
    head, first, second = out.splitlines()
    assert code == 0
    assert head.split() == ["run", "state", "step", "tokens", "loss", "tokens/s", "eta", "restarts", "job", "reason"]
    assert first.split() == ["runs/a", "running", "20/60", "1.28k", "2.5000", "200", "1m20s", "2", "7"]
    assert second.split()[:3] == ["runs/b", "failed", "8"]
    code, out = hopescale("jobs", "status", "runs/a")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, rows["state"], rows["nodes"], rows["log"]) == (0, "running", "node[1-2]", "runs/a/logs/7.log")
    assert rows["cluster"] == "test, 2 nodes, 2 ranks"
    assert hopescale("jobs", "list", "runs/nothing") == (0, "no runs in runs/nothing\n")


def test_that_slurm_cannot_be_asked_is_a_state(hopescale, fake, run):
    fake.controller_down()
    code, out = hopescale("jobs", "list")
    assert code == 0 and "unknown" in out and "Unable to contact slurm controller" in out
    code, out = hopescale("jobs", "requeue", run)
    assert code == 5 and "Unable to contact slurm controller" in out
    code, out = hopescale("jobs", "cancel", run)
    assert code == 5 and "Unable to contact slurm controller" in out


def test_logs(hopescale, run):
    assert hopescale("jobs", "logs", run, "--lines", 2) == (0, "10: line 58\n11: line 59\n")
    assert hopescale("jobs", "logs", run, "--rank", 3)[1].splitlines() == [f" 3: line {n}" for n in range(3, 60, 12)]
    (run / "outcome").write_text("done at step 60 of 60\n")
    assert hopescale("jobs", "logs", run, "--lines", 1) == (0, "11: line 59\n")
    (run / "logs" / "7.log").unlink()
    code, out = hopescale("jobs", "logs", run)
    assert code == 5 and "there is no log yet" in out


def test_a_chain(hopescale, fake, run):
    note(run, LedgerEntry("8", "2026-11-22T05:00:00+00:00", "test", 2, 2, "submit.sbatch", str(run / "logs" / "8.log")))
    fake.answer("scontrol", "\n".join([record("7", "RUNNING"), record("8", "PENDING", Reason="Dependency")]))
    assert hopescale("jobs", "logs", run, "--lines", 1) == (0, "11: line 59\n")
    assert hopescale("jobs", "cancel", run) == (0, "cancelled 8, 7\n")


def test_following_ends_with_the_job(hopescale, fake, run, monkeypatch):
    monkeypatch.setattr("hopescale.cli.jobs._POLL_S", 0.01)
    monkeypatch.setattr("hopescale.cli.jobs._LOOK_S", 0.0)
    asked = []

    def goes_on(folder):
        asked.append(folder)
        with (run / "logs" / "7.log").open("a") as log:
            log.write(f" 0: more {len(asked)}\n")
        return len(asked) < 3

    monkeypatch.setattr("hopescale.cli.jobs._goes_on", goes_on)
    code, out = hopescale("jobs", "logs", run, "--follow", "--lines", 1)
    assert (code, out.splitlines()) == (0, ["11: line 59", " 0: more 1", " 0: more 2", " 0: more 3"])


def test_cancel(hopescale, fake, run):
    assert hopescale("jobs", "cancel", run) == (0, "cancelled 7\n") and fake.calls("scancel") == ["7"]
    fake.answer("scontrol", record("7", "CANCELLED"))
    code, out = hopescale("jobs", "cancel", run)
    assert code == 0 and "no job that waits or runs" in out and fake.calls("scancel") == ["7"]
    code, out = hopescale("jobs", "cancel", "runs/zzz")
    assert code == 5 and "there is no run folder runs/zzz" in out


DAMAGE = {
    "jobs.jsonl": ['{"job": null}', "[]", "3", '{"job": "7", "elements": 3}', "\x00", None],
    "plan.json": ["[]", '{"total_sequences": "many", "global_batch_size": 8}', '{"dp": {}, "tp": "x", "pp": -1}'],
    "metrics.jsonl": ["7", '{"loss": "low", "step": [1], "tps": {}, "time/step_s": true}', None],
    "outcome": ["", "\x00\x01", None],
    "failures": [None],
    ".lock": [None],
    "checkpoints": ["a file"],
}
"""What may stand in a file of a run folder that something has damaged; None is a folder in its place."""


def test_a_damaged_folder_ends_no_list(hopescale, fake, run):
    count = 0
    for name, contents in DAMAGE.items():
        for text in contents:
            count += 1
            copytree(run, damaged := run.parent / f"damaged{count}")
            (damaged / name).unlink(missing_ok=True)
            (damaged / name).mkdir() if text is None else (damaged / name).write_text(text)
    (run.parent / "loop").symlink_to(run.parent / "loop")
    code, out = hopescale("jobs", "list")
    assert code == 0 and len(out.splitlines()) == 2 + count
    assert [line.split()[:2] for line in out.splitlines() if "runs/a " in line] == [["runs/a", "running"]]


def test_a_copied_folder_cancels_nothing(hopescale, fake, run):
    copytree(run, run.parent / "b")
    for order in ("cancel", "requeue", "logs"):
        code, out = hopescale("jobs", order, "runs/b")
        assert code == 5 and f"runs/b is a copy of {run}" in out
    assert fake.calls("scancel") == []


def test_bad_nodes_are_told_of_a_job_that_waits(hopescale, fake, run):
    (run / "bad_nodes").write_text("n2\nn1\nn2\n")
    fake.answer("scontrol", record("7", "PENDING", Reason="Resources"))
    assert "Resources; without bad nodes n1, n2" in hopescale("jobs", "status", run)[1]


def test_a_job_in_its_setup_cannot_be_told_to_save(hopescale, fake, run):
    fake.answer("squeue", "7.batch\n7.extern")
    code, out = hopescale("jobs", "requeue", run)
    assert code == 5 and "job 7 has not started its ranks yet" in out and fake.calls("scancel") == []


def test_requeue(hopescale, fake, run):
    fake.answer("squeue", "7.batch\n7.0")
    code, out = hopescale("jobs", "requeue", run)
    assert code == 0 and "save and stop" in out and fake.calls("scancel") == ["--signal=USR1 7"]
    fake.answer("scontrol", record("7", "PENDING", Reason="Resources"))
    assert hopescale("jobs", "requeue", run) == (0, "job 7 is waiting already: Resources\n")
    fake.answer("scontrol", record("7", "FAILED", Reason="NonZeroExitCode"))
    fake.answer("sbatch", "9")
    assert hopescale("jobs", "requeue", run) == (0, "job 9, log runs/a/logs/9.log\n")
    assert [entry.job for entry in entries(run)] == ["7", "9"]
    (run / "outcome").write_text("done at step 60 of 60\n")
    code, out = hopescale("jobs", "requeue", run)
    assert code == 5 and "is done" in out and len(fake.calls("sbatch")) == 1


def test_an_array_shows_its_elements(hopescale, fake, run, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    runs = {name: sweep / name for name in ("x", "y")}
    for index, folder in enumerate(runs.values()):
        folder.mkdir()
        note(folder, LedgerEntry(f"50_{index}", "t", "test", 1, 1, str(sweep / "s"), f"/logs/50_{index}.log"))
    elements = tuple((name, str(folder)) for name, folder in runs.items())
    note(sweep, LedgerEntry("50", "t", "test", 1, 1, "s", "/logs", elements))
    lines = [record("50", "PENDING", array="1", Reason="JobArrayTaskLimit"), record("51", "RUNNING", array="0")]
    fake.answer("scontrol", "\n".join(lines).replace("ArrayJobId=51", "ArrayJobId=50"))
    _, out = hopescale("jobs", "status", sweep)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["x", "running"], ["y", "waiting"]]
    assert "JobArrayTaskLimit" in out
    hopescale("jobs", "cancel", runs["x"])
    hopescale("jobs", "cancel", sweep)
    assert fake.calls("scancel") == ["50_0", "50"]
    for verb in ("logs", "requeue"):
        code, out = hopescale("jobs", verb, sweep)
        assert code == 5 and "folder of an array" in out
