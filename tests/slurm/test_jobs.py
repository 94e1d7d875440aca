"""Arrays, the verbs of `hopescale jobs`, a bad node and copies of data, on a real cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.prepare import prepare
from hopescale.data.records import Document
from hopescale.data.train_tokenizer import train_tokenizer
from hopescale.launch.array import Element, submit_array
from hopescale.launch.profile import ClusterProfile
from hopescale.launch.scheduler import Slurm
from hopescale.launch.status import run_status
from tests.support.cluster import Cluster, steps

TINY = (
    "model.d_model=16",
    "model.num_layers=1",
    "model.mixers.hope.chunk_size=8",
    "model.cms.levels.fast.d_ff=16",
    "model.cms.levels.mid.d_ff=16",
    "model.cms.levels.slow.d_ff=16",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=64",
    "train.validation.every=null",
    "optim.schedule.warmup_steps=2",
    "log.every=1",
    "log.trackers=[]",
)
BAD = "node2"


def test_arrays_and_bad_nodes(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.environ", slurm.environ)
    with ThreadPoolExecutor() as pool:
        played = [pool.submit(scene, slurm, tmp_path) for scene in (array, bad_node)]
    if failures := [error for scene in played if (error := scene.exception())]:
        raise ExceptionGroup("scenes", failures)


def array(slurm: Cluster, folder: Path) -> None:
    """Six runs, two at a time; one fails, and alone is tried again when its cause is gone."""
    sweep, missing = folder / "sweep", folder / "missing.yaml"
    options = {"time": "30", "max_failures": 0, "sbatch": ("--exclude=node[1-4]",)}
    profile = ClusterProfile("test", gpus_per_node=0, ranks_per_node=1, **options)
    recipes = ["debug", "debug", str(missing), "debug", "debug", "debug"]
    further = [["train.steps=3"], ["train.steps=3"], [], ["train.steps=3"], ["train.steps=3"], ["train.steps=20000"]]
    elements = [
        Element(f"e{n}", sweep / f"e{n}", ("train", recipe, *TINY, *more, "--run-dir", str(sweep / f"e{n}")))
        for n, (recipe, more) in enumerate(zip(recipes, further, strict=True))
    ]
    (id,) = submit_array(elements, profile, sweep, max_at_once=2)
    last, at_once = elements[5], []

    def only_the_last_runs() -> bool:
        live = [job for job in Slurm().jobs(id) if job.live]
        assert live, "the last element has ended"
        at_once.append(sum(job.state == "RUNNING" for job in live))
        return [job.id for job in live] == [f"{id}_5"] and max(steps(last.run_dir), default=0) > 0

    slurm.wait(only_the_last_runs, "the last element to be alone")
    assert max(at_once) == 2
    rows = [line.split() for line in slurm.hopescale("jobs", "status", sweep, cwd=folder).splitlines()]
    states = {row[0]: row[1] for row in rows[1:]}
    assert states == {"e0": "done", "e1": "done", "e2": "failed", "e3": "done", "e4": "done", "e5": "running"}
    assert "missing.yaml" in slurm.hopescale("jobs", "logs", elements[2].run_dir, cwd=folder)
    listed = slurm.hopescale("jobs", "list", sweep, cwd=folder)
    assert len(listed.splitlines()) == 7 and "exit code 2" in listed

    slurm.hopescale("jobs", "requeue", last.run_dir, cwd=folder)
    slurm.wait(lambda: Slurm().job(f"{id}_5").restarts == 1, "the last element to be requeued")
    assert {job.restarts for job in Slurm().jobs(id) if job.id != f"{id}_5"} == {0}
    slurm.hopescale("jobs", "cancel", last.run_dir, cwd=folder)
    slurm.wait(lambda: run_status(last.run_dir, Slurm()).state == "cancelled", "the last element to be cancelled")

    missing.write_text("base: debug\n")
    elements[2] = Element("e2", elements[2].run_dir, (*elements[2].command, "train.steps=3"))
    (again,) = submit_array(elements, profile, sweep, only="failed")
    slurm.wait(lambda: Slurm().job(f"{again}_0").live is False, "the failed element to end")
    assert run_status(elements[2].run_dir, Slurm()).state == "done"
    assert submit_array(elements, profile, sweep, only="failed") == []


def bad_node(slurm: Cluster, folder: Path) -> None:
    """A node with a disk that cannot be written is named and left out; on the others, data is copied and read there."""
    data, disk, run = folder / "data", folder / "disk", folder / "checked"
    write_data(data)
    profile = folder / "checked.yaml"
    lines = ("gpus_per_node: 0", "ranks_per_node: 1", "cpus_per_node: 2", 'time: "30"', "preflight: drain")
    more = (f"local_disk: {disk}", 'sbatch: ["--exclude=node[4-8]"]')
    profile.write_text("\n".join((*lines, *more)) + "\n")
    sources = ("data.sources.markov=null", f"data.sources.text.path={data}", "model.vocab_size=290")
    disk.mkdir()
    with slurm.own_disk(BAD, disk, "-o", "ro"):
        (id,) = slurm.submit(
            *("debug", *TINY, *sources, "train.steps=4", "--nodes", 2, "--cluster", profile, "--run-dir", run),
            cwd=folder,
        )
        assert slurm.ended(id)["JobState"] == "COMPLETED", (run / "logs" / f"{id}.log").read_text()
    log = (run / "logs" / f"{id}.log").read_text()
    assert f"bad node {BAD}: {disk}: Read-only file system" in log
    assert "check of nodes: all good: 2 nodes, 2 ranks" in log
    assert (run / "bad_nodes").read_text() == f"{BAD}\n"
    assert slurm.hosts(id) == ["node1", "node3"] and slurm.job(id)["Restarts"] == "1"
    assert "node1: text: " in log and "node3: text: " in log and f"in {disk}" in log
    assert len(steps(run)) == 4
    status = slurm.hopescale("jobs", "status", run, cwd=folder)
    assert "4/4" in status and "done" in status and "step 4/4" in slurm.hopescale("jobs", "logs", run, cwd=folder)


def write_data(folder: Path) -> None:
    documents = [Document(f"def f{n}(x):\n    return x * {n} + {n % 7}\n" * 3, f"made:{n}") for n in range(60)]
    train_tokenizer(documents, folder.with_name("tokenizer"), vocab_size=290)
    prepare(documents, load_tokenizer(folder.with_name("tokenizer")), folder, validation=0.1)
