"""A sweep as an array of jobs on a real cluster."""

from __future__ import annotations

import csv
from pathlib import Path

from hopescale.observe.metrics import read_metrics
from tests.support.cluster import Cluster
from tests.support.sweeps import toy_sweep

SWEEP = toy_sweep([6, 7, 8])
PROFILE = 'gpus_per_node: 0\nranks_per_node: 1\ncpus_per_node: 1\ntime: "10"\nsignal_lead_s: 60\n'


def test_a_sweep_runs_as_arrays_that_leave_out_what_is_done(slurm: Cluster, tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "cpus.yaml").write_text(PROFILE)

    def submit(*options: object) -> str:
        return slurm.hopescale("sweep", "submit", "sweep.yaml", "--cluster", "cpus.yaml", *options, cwd=tmp_path)

    def states() -> dict[str, str]:
        slurm.hopescale("sweep", "collect", "sweep.yaml", cwd=tmp_path)
        rows = csv.DictReader((tmp_path / "sweeps/toy/points.csv").read_text().splitlines())
        return {row["trial"]: row["state"] for row in rows}

    def done(*trials: str) -> bool:
        found = states()
        return all(found[trial] == "done" for trial in trials)

    trials = tmp_path / "sweeps/toy/trials"
    first = submit("--first", 2, "--max-at-once", 1).removeprefix("job ").partition(",")[0]
    slurm.wait(lambda: done("steps6", "steps7"), "the first two trials")
    slurm.ended(f"{first}_1")
    assert states() == {"steps6": "done", "steps7": "done", "steps8": "waiting"}
    record = (trials / "steps6/metrics.jsonl").read_bytes()

    submit()
    slurm.wait(lambda: done("steps8"), "the third trial")
    assert (trials / "steps6/metrics.jsonl").read_bytes() == record
    assert [record["step"] for record in read_metrics(trials / "steps8/metrics.jsonl")] == list(range(9))
    assert (tmp_path / "sweeps/toy/array-2/submit.sbatch").read_text().count("--array=0-0") == 1
    assert "3 trials, 3 done" in slurm.hopescale("sweep", "status", "sweep.yaml", cwd=tmp_path)
    assert "nothing to submit" in submit()
