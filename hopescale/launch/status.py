"""How a run stands: what its folder holds, and what Slurm says of its last job."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hopescale.config.record import CONFIG, PLAN
from hopescale.launch.ledger import JOBS, LedgerEntry, entries
from hopescale.launch.scheduler import GONE, UNKNOWN, Slurm, SlurmJob
from hopescale.observe.metrics import read_last

DONE, FAILED, RUNNING, WAITING, STOPPED, CANCELLED = "done", "failed", "running", "waiting", "stopped", "cancelled"
"""States of a run, besides `unknown`: Slurm cannot be asked about its job."""

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_NOT_SEARCHED = ("checkpoints", "code", "logs", "tb", "exports", "evals", "elements")


@dataclass(frozen=True)
class Status:
    """How a run stands. What is not known is None.

    Attributes:
        folder: The run folder.
        state: `running`, `waiting`, `done`, `failed`, `stopped`, `cancelled`, or `unknown`.
        reason: Why; for a job that waits, what for.
        job: What Slurm says of its last job; of a chain, of the one whose turn it is.
        entry: That job's line in `jobs.jsonl`.
        failures: Failures since the last newer checkpoint.
        step: Last step that was recorded.
        steps: Steps of the whole run.
        tokens: Training tokens read by then.
        loss: Loss at the last step that has one.
        tps: Tokens per second of all devices together, last measured.
        eta_s: Seconds until the last step, while it runs.
        checkpoint: Name of the checkpoint it would continue from.
    """

    folder: Path
    state: str
    reason: str | None = None
    job: SlurmJob | None = None
    entry: LedgerEntry | None = None
    failures: int = 0
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    tps: float | None = None
    eta_s: float | None = None
    checkpoint: str | None = None


def run_status(folder: Path, slurm: Slurm) -> Status:
    """Find out how a run stands.

    Args:
        folder: The run folder.
        slurm: Asked about the last job, unless the folder says that the run is done.
    """
    known, plan = entries(folder), _json(folder / PLAN)
    outcome = _text(folder / "outcome")
    checkpoint = _text(folder / "checkpoints" / "latest") or None
    failures = [line for line in _text(folder / "failures").splitlines() if line.startswith(f"{checkpoint or 'none'} ")]
    entry, job = (known[-1] if known else None, None) if outcome.startswith("done") else _current(known, slurm)
    state, reason = _state(folder, job, outcome, failures)
    sequences, batch = plan.get("total_sequences"), plan.get("global_batch_size")
    status = Status(
        folder,
        state,
        reason,
        job=job,
        entry=entry,
        failures=len(failures),
        steps=sequences // batch if sequences and batch else None,
        checkpoint=checkpoint,
    )
    ranks = plan.get("dp", 1) * plan.get("tp", 1) * plan.get("pp", 1)
    return _with_progress(status, read_last(folder / "metrics.jsonl"), ranks)


def find_runs(root: Path) -> list[Path]:
    """Return the run folders in a folder, itself included, sorted; a run has a `config.yaml` or a `jobs.jsonl`."""
    return sorted(_walk(root))


def elements_of_array(folder: Path) -> dict[str, Path]:
    """Return the run folders of the arrays that were submitted from a folder, by name; empty for a run."""
    return {name: Path(run) for entry in entries(folder) for name, run in entry.elements}


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        path = Path(folder)
        names[:] = [name for name in names if name not in _NOT_SEARCHED and not name.startswith(".")]
        if (CONFIG in files and PLAN in files) or (JOBS in files and entries(path) and not elements_of_array(path)):
            yield path


def _current(known: Sequence[LedgerEntry], slurm: Slurm) -> tuple[LedgerEntry | None, SlurmJob | None]:
    """Return the last submission, or that which it waits for, and what Slurm says of its job."""
    entry, job = None, None
    for earlier in reversed(known):
        found = slurm.job(earlier.job)
        if job is not None and not found.live:
            break
        entry, job = earlier, found
        if job.state != "PENDING" or job.reason != "Dependency":
            break
    return entry, job


def _state(folder: Path, job: SlurmJob | None, outcome: str, failures: list[str]) -> tuple[str, str | None]:
    """Return the state and its reason; what the folder says of an end counts more than what Slurm does."""
    if outcome.startswith("done"):
        return DONE, None
    if job is not None and job.live:
        return (WAITING if job.state in _WAITING else RUNNING), job.reason
    if outcome.startswith("gave up"):
        return FAILED, outcome
    if job is None:
        return (RUNNING, "without Slurm") if _is_locked(folder) else (STOPPED, outcome or None)
    if job.state == UNKNOWN:
        return "unknown", f"Slurm cannot be asked: {job.reason}"
    if job.state == "COMPLETED" and not outcome:
        return DONE, None
    if job.state == "CANCELLED":
        return CANCELLED, None
    if outcome and job.state in ("COMPLETED", GONE):
        return STOPPED, outcome
    said = "Slurm has forgotten the job" if job.state == GONE else " ".join(filter(None, (job.state, job.reason)))
    return FAILED, "; ".join([said, *failures[-1:]])


def _with_progress(status: Status, records: list[dict[str, Any]], ranks: int) -> Status:
    def last(name: str) -> Any:
        return next((record[name] for record in reversed(records) if record.get(name) is not None), None)

    step, seconds, tps = last("step"), last("time/step_s"), last("tps")
    left = None if None in (step, status.steps, seconds) or status.state != RUNNING else status.steps - step
    return replace(
        status,
        step=step,
        tokens=last("tokens_seen"),
        loss=last("loss"),
        tps=None if tps is None else tps * ranks,
        eta_s=None if left is None else left * seconds,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_locked(folder: Path) -> bool:
    """Look whether a process of this machine, or of one that shares its locks, trains in a folder."""
    with suppress(FileNotFoundError, PermissionError), (folder / ".lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
