"""State of a run: the one table of states, read from its folder and from the supervisor of its processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from hopescale.common import disk
from hopescale.config.record import PLAN
from hopescale.observe.metrics import read_last

WAITING, RUNNING, STOPPED, CANCELLED = "waiting", "running", "stopped", "cancelled"
FAILED, DIVERGED, DONE, UNKNOWN = "failed", "diverged", "done", "unknown"
"""States of a run. A run that is `stopped` would continue. A run that `failed` would too, but an error ended it.
`unknown` is the state of a run whose supervisor cannot be asked."""

ENDED = "ended"
"""The word of a supervisor that saw no error: the run's own word decides, and a run without one has failed."""

OUTCOME = "outcome"
"""File in a run folder with the last word of the run, or of the batch script that gave it up."""

BAD_NODES = "bad_nodes"
"""File in a run folder with the names of nodes that the run does not start on again, one a line."""

_WORDS = {
    re.compile(r"done at step (\d+) of \1$"): DONE,
    re.compile(r"gave up: diverged"): DIVERGED,
    re.compile(r"gave up"): FAILED,
    re.compile(r"stopped by|paused"): STOPPED,
}
"""States by the words of `outcome`. A run is done when it says so at its last step, and by nothing else."""


@dataclass(frozen=True)
class Word:
    """State of a run as its supervisor knows it: Slurm, or a pool of processes.

    Attributes:
        state: A state of the table, or `ENDED`.
        reason: Reason for it; None if there is none to tell.
    """

    state: str
    reason: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. A value that is not known is None.

    Attributes:
        state: State of the table above.
        reason: Reason for the state; of a job that waits, the reason to wait.
        failures: Number of failures since the last newer checkpoint.
        step: Last step that was recorded.
        steps: Number of steps of the whole run.
        tokens: Number of training tokens read by then.
        loss: Loss at the last step that has one.
        tps: Tokens per second of all devices together, last measured.
        eta_s: Seconds until the last step, while the run is running.
        checkpoint: Name of the checkpoint from which the run would continue.
        records: Last records of its metrics, oldest first.
    """

    state: str
    reason: str | None = None
    failures: int = 0
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    loss: float | None = None
    tps: float | None = None
    eta_s: float | None = None
    checkpoint: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)


def read_status(folder: Path, ask: Callable[[], Word | None]) -> RunStatus:
    """Find out how a run stands. Changes nothing, and may be called while the run is running anywhere.

    Args:
        folder: Run folder; need not exist.
        ask: Function that returns the word of the run's supervisor, None if there is none. It is not called for a run
            that is done.
    """
    plan, records = _read_json(folder / PLAN), read_last(folder / "metrics.jsonl")
    outcome, checkpoint = _read_text(folder / OUTCOME), _read_text(folder / "checkpoints" / "latest") or None
    failures = [
        line for line in _read_text(folder / "failures").splitlines() if line.startswith(f"{checkpoint or 'none'} ")
    ]
    state, reason = _state(folder, outcome, ask, failures[-1:])

    def last(name: str) -> Any:
        return next((record[name] for record in reversed(records) if _is_number(record.get(name))), None)

    sequences, batch = (_count(plan, key) for key in ("total_sequences", "global_batch_size"))
    split = [_count(plan, axis) for axis in ("dp", "tp", "pp", "cp")]
    steps = sequences // batch if sequences and batch else None
    step, seconds, tps = last("step"), last("time/step_s"), last("tps")
    left = None if None in (step, steps, seconds) or state != RUNNING else steps - step
    return RunStatus(
        state,
        reason,
        failures=len(failures),
        step=step,
        steps=steps,
        tokens=last("tokens_seen"),
        loss=last("loss"),
        tps=None if tps is None else tps * prod(ranks or 1 for ranks in split),
        eta_s=None if left is None else left * seconds,
        checkpoint=checkpoint,
        records=records,
    )


def is_locked(folder: Path) -> bool:
    """Look whether a process of this machine, or of one that shares its locks, trains in a run folder."""
    return disk.is_locked(folder / ".lock")


def _state(folder: Path, outcome: str, ask: Callable[[], Word | None], failure: list[str]) -> tuple[str, str | None]:
    """Return the state and its reason; the folder's word on an end counts more than a supervisor's."""
    own = next((state for pattern, state in _WORDS.items() if pattern.match(outcome)), None)
    if own == DONE:
        return DONE, None
    word = ask()
    if word is not None and word.state in (WAITING, RUNNING):
        return word.state, word.reason
    if own in (FAILED, DIVERGED):
        return own, outcome
    if word is None:
        return (RUNNING, "without Slurm") if is_locked(folder) else (STOPPED, outcome or None)
    if word.state == ENDED and own == STOPPED:
        return STOPPED, outcome
    if word.state in (ENDED, FAILED):
        return FAILED, "; ".join([*filter(None, [word.reason]), *failure]) or None
    return word.state, word.reason


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(content: dict[str, Any], key: str) -> int | None:
    value = content.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
