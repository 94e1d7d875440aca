"""What `submit` and `jobs` take from a shell and from folders, on a real cluster; most jobs are held."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

from tests.support.cluster import Cluster
from tests.support.tiny import TINY

HELD = "sbatch: ['--hold']"
RUN = ("debug", *TINY, "train.steps=3", "train.validation.every=null")


def test_a_copied_run_folder_ends_no_job(slurm: Cluster, tmp_path: Path, profile):
    (id,) = slurm.submit(*RUN, "--cluster", profile("held", HELD), "--run-dir", "run", cwd=tmp_path)
    copytree(tmp_path / "run", tmp_path / "copy")
    assert f"copy is a copy of {tmp_path}/run" in slurm.refused(5, "jobs", "cancel", "copy", cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "copy is a copy of" in slurm.refused(5, "jobs", "cancel", "copy", cwd=tmp_path)
    assert slurm.job(id)["JobState"] == "PENDING"
    assert slurm.hopescale("jobs", "cancel", "moved", cwd=tmp_path) == f"cancelled {id}\n"
    assert slurm.ended(id)["JobState"] == "CANCELLED"


def test_one_of_two_submits_at_once_is_taken(slurm: Cluster, tmp_path: Path, profile):
    held = profile("held", HELD)

    def submit(_: int) -> tuple[bool, str]:
        try:
            return True, slurm.submit(*RUN, "--cluster", held, "--run-dir", "run", cwd=tmp_path)[0]
        except AssertionError as error:
            return False, str(error)

    with ThreadPoolExecutor() as pool:
        (refused, refusal), (taken, id) = sorted(pool.map(submit, range(2)))
    assert (refused, taken) == (False, True), refusal
    assert "another process is submitting" in refusal or f"is in use by job {id}, pending" in refusal
    assert (tmp_path / "run" / "jobs.jsonl").read_text().count("\n") == 1
    slurm.run("scancel", id)


def test_what_a_shell_and_an_allocation_have_set_reaches_no_job(slurm: Cluster, tmp_path: Path, profile):
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    exported = [f"{name}={value}" for name, value in (torchrun | {"SBATCH_NO_REQUEUE": "1"}).items()]
    words = ("submit", *RUN, "--cluster", profile("memory", "mem: 1000M"), "--run-dir", "run")
    allocated = ("salloc", "--quiet", "--ntasks=1", "--mem-per-cpu=200")
    said = slurm.run("env", *exported, *allocated, sys.executable, "-m", "hopescale", *words, cwd=tmp_path)
    job = slurm.ended(id := said.removeprefix("job ").partition(",")[0])
    log = (tmp_path / "run" / "logs" / f"{id}.log").read_text()
    assert (job["JobState"], job["Requeue"], job["MinMemoryNode"]) == ("COMPLETED", "1", "1000M"), log
    assert "2 ranks (dp 2, tp 1, pp 1)" in log, log


def test_what_would_wait_for_ever_or_fail_at_each_start_is_not_submitted(slurm: Cluster, tmp_path: Path, profile):
    urgent = profile("urgent", "partition: urgent", HELD)
    slurm.run("scontrol", "update", "PartitionName=urgent", "MaxTime=10")
    try:
        words = ("submit", *RUN, "--cluster", urgent, "--run-dir", "run")
        refusal = slurm.refused(2, *words, "--nodes", 9, "train.global_batch_tokens=576", cwd=tmp_path)
    finally:
        slurm.run("scontrol", "update", "PartitionName=urgent", "MaxTime=UNLIMITED")
    assert "--time: 30, but the most that partition urgent allows is 10:00" in refusal
    assert "--nodes: 9, but partition urgent has 8" in refusal
    nowhere = ("data.sources.markov=null", "data.sources.main.path=nowhere")
    assert "nowhere/index.json" in slurm.refused(3, *words, *nowhere, cwd=tmp_path)
    assert "account: YOUR_ACCOUNT" in slurm.refused(2, "submit", "debug", "--cluster", "modules", cwd=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_job_that_waits_for_nodes_says_which_it_leaves_out(slurm: Cluster, tmp_path: Path, profile):
    words = (*RUN, "--cluster", profile("few", HELD), "--nodes", 2, "train.global_batch_tokens=128")
    (id,) = slurm.submit(*words, "--run-dir", "run", cwd=tmp_path)
    (tmp_path / "run" / "bad_nodes").write_text("node1\n")
    slurm.run("scontrol", "update", f"JobId={id}", "ExcNodeList=node[1-7]")
    slurm.run("scontrol", "release", id)
    waits = "BadConstraints; without bad nodes node1"
    slurm.wait(lambda: waits in slurm.hopescale("jobs", "status", "run", cwd=tmp_path), waits)
    slurm.run("scancel", id)
