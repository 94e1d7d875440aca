"""How far a trial is, read from its run folder alone: the record of the run, and a note of how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hopescale.common.disk import replace_text
from hopescale.common.errors import ConfigError, DivergedError, LaunchError
from hopescale.common.paths import display_path
from hopescale.config.load import load_resolved
from hopescale.config.record import CONFIG
from hopescale.config.show import diff, format_diff
from hopescale.observe.metrics import read_metrics
from hopescale.sweep.grid import Sweep, Trial

WAITING, RUNNING, STOPPED, FAILED, DIVERGED, DONE = "waiting", "running", "stopped", "failed", "diverged", "done"
"""States of a trial. `stopped` has begun and would continue; `failed` too, but what ended it went wrong."""

NOTE = "trial.json"
GAVE_UP = "gave up"
"""What the batch script of a job writes to `outcome` of a run that it will not start again, before the exit code."""

FRESH_S = 120.0
"""A trial that somebody else started counts as running as long as its last record is no older."""


@dataclass(frozen=True)
class Note:
    """What the process that runs trials keeps about one: how often it was started, and how it ended.

    Attributes:
        state: `running`, or how the last start ended.
        starts: Starts so far.
        failures: Starts that failed.
        host: Machine of the last start.
        pid: Its process there.
        message: The last line it wrote, where it failed or diverged.
    """

    state: str
    starts: int = 0
    failures: int = 0
    host: str = ""
    pid: int = 0
    message: str = ""

    def alive(self) -> bool | None:
        """Tell whether the noted process runs; None where there is none, or that is another machine's to say."""
        if self.state != RUNNING or self.host != socket.gethostname():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


@dataclass(frozen=True)
class Progress:
    """How far a trial is.

    Attributes:
        state: One of the states above.
        step: Step of the last record.
        loss: Held-out loss of the last step of a trial that is done, else the last loss recorded; None before any.
        source: Where `loss` comes from: `val/<set>`, or `train` and how many records it is the mean of.
        tps: Tokens per second last recorded; None before any.
        starts: How often it was started by `run`.
        message: What it said as it failed or diverged.
    """

    state: str
    step: int = 0
    loss: float | None = None
    source: str = ""
    tps: float | None = None
    starts: int = 0
    message: str = ""


def trial_folder(folder: Path, trial: Trial) -> Path:
    """Return the run folder of a trial in a sweep's folder."""
    return folder / "trials" / trial.name


def read_note(run_dir: Path) -> Note:
    """Read the note of a trial; one that was never started waits."""
    try:
        return Note(**json.loads((run_dir / NOTE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Note(WAITING)
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(f"{run_dir / NOTE} cannot be read: {error}", "remove it; the trial's record stays") from error


def write_note(run_dir: Path, note: Note) -> None:
    """Replace the note of a trial; a kill leaves the old one or the new one.

    Raises:
        LaunchError: If it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(run_dir / NOTE, json.dumps(asdict(note)) + "\n")
    except OSError as error:
        raise LaunchError(f"cannot write {run_dir}: {error.strerror}", "choose another --sweep-dir") from error


def look(run_dir: Path, steps: int) -> Progress:
    """Find out how far a trial is. Changes nothing, and may be called while it runs anywhere.

    Args:
        run_dir: Its run folder; need not exist.
        steps: Its last step.

    Raises:
        DataError: If its record is damaged.
    """
    note, metrics = read_note(run_dir), run_dir / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    step = records[-1]["step"] if records else 0
    done = bool(records) and step >= steps
    loss, source = _loss(records, done)
    state = DONE if done else _state(run_dir, note)
    tps = next((record["tps"] for record in reversed(records) if record.get("tps")), None)
    message = note.message if state in (FAILED, DIVERGED) else ""
    return Progress(state, step, loss, source, tps, note.starts, message)


def _state(run_dir: Path, note: Note) -> str:
    """Return the state of a trial that is not done."""
    metrics, outcome = run_dir / "metrics.jsonl", run_dir / "outcome"
    if note.alive():
        return RUNNING
    if outcome.exists() and (text := outcome.read_text(encoding="utf-8")).startswith(GAVE_UP):
        return DIVERGED if f"exit code {DivergedError.exit_code}," in text else FAILED
    written = metrics.stat().st_mtime if metrics.exists() else 0.0
    noted = (run_dir / NOTE).stat().st_mtime if note.state not in (WAITING, RUNNING) else 0.0
    if time.time() - written < FRESH_S and written > noted and note.alive() is not False:
        return RUNNING
    if note.state in (DIVERGED, FAILED):
        return note.state
    return STOPPED if metrics.exists() or note.starts else WAITING


def _loss(records: list[dict[str, Any]], done: bool, last: int = 10) -> tuple[float | None, str]:
    """Return the loss that stands for a run and where it comes from."""
    names = [name for name in (records[-1] if done else ()) if name.startswith("val/") and name.endswith("/loss")]
    if names:
        values = [records[-1][name] for name in names if records[-1][name] is not None]
        mean = sum(values) / len(values) if len(values) == len(names) else None
        return mean, " ".join(name.removesuffix("/loss") for name in names)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    if not losses:
        return None, ""
    tail = losses[-last:] if done else losses[-1:]
    return sum(tail) / len(tail), f"train, mean of {len(tail)}" if done else "train"


def as_trained(trials: Sequence[Trial], folder: Path) -> list[Trial]:
    """Return the trials, those that have begun with the configs in their run folders."""
    return [
        trial.trained_with(load_resolved(path)) if (path := _config(trial, folder)).exists() else trial
        for trial in trials
    ]


def require_same(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> None:
    """Check that the trials that have begun have the configs that the sweep's file gives now.

    Raises:
        ConfigError: Naming every trial whose config has changed since, with the difference.
    """
    changed = []
    for trial in trials:
        path = _config(trial, folder)
        changes = diff(load_resolved(path), trial.config) if path.exists() else []
        if changes:
            changed.append(f"trial {trial.name}:\n{format_diff(changes)}")
    if changed:
        text = "\n".join(changed).replace("\n", "\n    ")
        hint = "set them back, remove those trials' folders, or give the sweep another name"
        message = f"{display_path(sweep.path)} gives other configs to {len(changed)} trials that have begun\n    {text}"
        raise ConfigError(message, hint)


def _config(trial: Trial, folder: Path) -> Path:
    return trial_folder(folder, trial) / CONFIG
