"""How a submitted run stands: the word of its folder, and what Slurm says of its last job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hopescale.config.record import CONFIG, PLAN
from hopescale.launch.ledger import JOBS, LedgerEntry, entries
from hopescale.launch.scheduler import GONE, UNKNOWN, Slurm, SlurmJob
from hopescale.observe import run_status as table
from hopescale.observe.run_status import BAD_NODES, RunStatus, Word, read_status

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_NOT_SEARCHED = ("checkpoints", "code", "logs", "tb", "exports", "evals", "elements")


@dataclass(frozen=True)
class JobStatus(RunStatus):
    """How a run stands, with its job."""

    job: SlurmJob | None = None
    """Slurm's answer about its last job; of a chain, about the one whose turn it is."""
    entry: LedgerEntry | None = None
    """Line of that job in `jobs.jsonl`."""


def run_status(folder: Path, slurm: Slurm) -> JobStatus:
    """Find out how a run stands; Slurm is asked about the last job unless the folder says that the run is done."""
    known = entries(folder)
    entry, job = known[-1] if known else None, None

    def ask() -> Word | None:
        nonlocal entry, job
        entry, job = _current(known, slurm)
        return None if job is None else _word(job)

    status = read_status(folder, ask)
    if status.state == table.WAITING and (bad := _bad_nodes(folder)):
        status = replace(status, reason="; ".join(filter(None, (status.reason, f"without bad nodes {', '.join(bad)}"))))
    return JobStatus(**vars(status), job=job, entry=entry)


def find_runs(root: Path) -> list[Path]:
    """Return the run folders in a folder, itself included, sorted; a run has a `config.yaml` or a `jobs.jsonl`."""
    runs = []
    for folder, names, files in os.walk(root):
        path = Path(folder)
        names[:] = [name for name in names if name not in _NOT_SEARCHED and not name.startswith(".")]
        if (CONFIG in files and PLAN in files) or (JOBS in files and entries(path) and not elements_of_array(path)):
            runs.append(path)
    return sorted(runs)


def elements_of_array(folder: Path) -> dict[str, Path]:
    """Return the run folders of the arrays that were submitted from a folder, by name; empty for a run."""
    return {name: Path(run) for entry in entries(folder) for name, run in entry.elements}


def _bad_nodes(folder: Path) -> list[str]:
    """Return the nodes that the run leaves out: with too few others, its job waits for ever."""
    try:
        return sorted(set((folder / BAD_NODES).read_text(encoding="utf-8", errors="replace").split()))
    except OSError:
        return []


def _current(known: Sequence[LedgerEntry], slurm: Slurm) -> tuple[LedgerEntry | None, SlurmJob | None]:
    """Return the last submission, or that which it waits for, and what Slurm says of its job."""
    entry, job = None, None
    for earlier in reversed(known):
        answer = slurm.job(earlier.job)
        if job is not None and not answer.live:
            break
        entry, job = earlier, answer
        if job.state != "PENDING" or job.reason != "Dependency":
            break
    return entry, job


def _word(job: SlurmJob) -> Word:
    """Return the state of a run by its job alone."""
    if job.live:
        return Word(table.WAITING if job.state in _WAITING else table.RUNNING, job.reason)
    if job.state == UNKNOWN:
        return Word(table.UNKNOWN, f"Slurm cannot be asked: {job.reason}")
    if job.state == "CANCELLED":
        return Word(table.CANCELLED)
    if job.state == GONE:
        return Word(table.ENDED, "Slurm has forgotten the job")
    if job.state == "COMPLETED":
        return Word(table.ENDED, "COMPLETED, but the run does not say that it is done")
    return Word(table.FAILED, " ".join(filter(None, (job.state, job.reason))))
