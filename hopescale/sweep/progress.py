"""How a trial stands: the word of its run folder, and a note of the process that runs trials on how it ended."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hopescale.checkpoint.manifest import MANIFEST, POINTER, folder_name, read_manifest, read_pointer
from hopescale.common.disk import replace_text
from hopescale.common.errors import CheckpointError, ConfigError, DataError, LaunchError
from hopescale.common.paths import display_path
from hopescale.config.load import load_resolved
from hopescale.config.record import CONFIG
from hopescale.config.show import Change, diff, format_diff, is_other_place
from hopescale.data.identity import fingerprint_here
from hopescale.observe.metrics import read_metrics
from hopescale.observe.run_status import (
    DIVERGED,
    DONE,
    FAILED,
    OUTCOME,
    RUNNING,
    STOPPED,
    UNKNOWN,
    WAITING,
    RunStatus,
    Word,
    read_status,
)
from hopescale.sweep.choice import LEFT_OUT, best_of
from hopescale.sweep.grid import Sweep
from hopescale.sweep.trial import Branch, Trial

NOTE = "trial.json"

FRESH_S = 120.0
"""A trial that somebody else started counts as running as long as its last record is no older."""

_IN_MEAN = 10
"""Number of training losses that stand for a run without held-out text."""


@dataclass(frozen=True)
class Note:
    """A record of the process that runs trials about one of them: how often it was started, and how it ended."""

    state: str
    """State in which the last start ended, or `running`."""
    starts: int = 0
    failures: int = 0
    """Number of starts that failed."""
    host: str = ""
    """Machine of the last start."""
    pid: int = 0
    message: str = ""
    """Last line of the process, if it failed or diverged."""

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
class TrialStatus(RunStatus):
    """How a trial stands. Its loss is the held-out one of the last step if it is done, else the last one recorded."""

    source: str = ""
    """Origin of `loss`: `val/<set>`, or `train` and the number of records in the mean."""
    starts: int = 0


def trial_folder(folder: Path, trial: Trial) -> Path:
    """Return the run folder of a trial in a sweep's folder."""
    return folder / "trials" / trial.name


def branch_checkpoint(run_dir: Path, branch: Branch) -> Path:
    """Return the checkpoint that a trial branches off from: of the trial beside it."""
    return run_dir.parent / branch.trunk / "checkpoints" / folder_name(branch.step)


def can_start(run_dir: Path, trial: Trial) -> bool:
    """Tell whether a trial can start: a branch without a checkpoint of its own needs that of its trunk."""
    if trial.branch is None or (run_dir / "checkpoints" / POINTER).is_file():
        return True
    return (branch_checkpoint(run_dir, trial.branch) / MANIFEST).is_file()


def lost_with_trunk(
    trial: Trial, folder: Path, ended: Collection[str] | None = (DONE, DIVERGED, FAILED)
) -> Word | None:
    """Say how a trial ends that cannot begin: a branch whose trunk has ended, and will not come to its step.

    It has diverged if the trunk has, as a run of its own would have.

    Args:
        trial: Trial of the sweep.
        folder: Folder of the sweep.
        ended: States in which the trunk will not go on; None if it will not in any.

    Returns:
        State and reason; None if the trial has what it begins with, or may get it.
    """
    run_dir = trial_folder(folder, trial)
    if can_start(run_dir, trial):
        return None
    trunk, step = trial.branch.trunk, trial.branch.step
    state = trial_status(run_dir.parent / trunk).state
    if ended is not None and state not in ended:
        return None
    if state == DIVERGED:
        return Word(DIVERGED, f"its trunk {trunk} diverged before step {step}")
    return Word(FAILED, f"its trunk {trunk} is {state}, and holds no {folder_name(step)}")


def is_chosen(trial: Trial, folder: Path) -> bool | None:
    """Tell whether the choice that a trial takes part in fell on its value; None as long as it is open."""
    if trial.choice is None:
        return True
    ended = {name: trial_status(folder / "trials" / name) for name in trial.choice.among}
    best = best_of(trial.choice, {name: (status.state, status.loss) for name, status in ended.items()})
    return None if best is None else best == trial.choice.twin


def read_note(run_dir: Path) -> Note:
    """Read the note of a trial; one that was never started waits."""
    try:
        note = Note(**json.loads((run_dir / NOTE).read_text(encoding="utf-8")))
        for name, value in vars(note).items():
            if not isinstance(value, int if name in ("starts", "failures", "pid") else str):
                raise TypeError(f"{name} is {value!r}")
        return note
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


def status_in_sweep(trial: Trial, folder: Path) -> TrialStatus:
    """Find out how a trial of a sweep stands; a branch depends on its trunk.

    A branch that waits for a trunk which has ended before its step has ended too. A trial that has not begun when the
    choice falls on another value is left out. Without held-out text the records of
    the shared steps count in the loss of a branch that has too few of its own, as they do in a run of its own.

    Args:
        trial: Trial of the sweep.
        folder: Folder of the sweep.
    """
    run_dir = trial_folder(folder, trial)
    status = trial_status(run_dir)
    if status.state in (WAITING, STOPPED) and (word := lost_with_trunk(trial, folder)) is not None:
        return replace(status, state=word.state, reason=word.reason)
    if status.state == WAITING and not trial.is_candidate and is_chosen(trial, folder) is False:
        return replace(status, state=LEFT_OUT)
    own = sum(record.get("loss") is not None for record in status.records)
    if status.state == DONE and trial.branch and own < _IN_MEAN and not status.source.startswith("val/"):
        path = run_dir.parent / trial.branch.trunk / "metrics.jsonl"
        records = read_metrics(path) if path.is_file() else []
        shared = [record for record in records if record["step"] <= trial.branch.step]
        loss, source = _loss([*shared, *status.records], done=True)
        return replace(status, loss=loss, source=source)
    return status


def trial_status(run_dir: Path) -> TrialStatus:
    """Find out how a run folder of a sweep stands, which need not exist. May be called while it is running anywhere.

    A note that is damaged makes no other trial's state unknown; the run's own word counts more than any note.
    """
    try:
        note = read_note(run_dir)
    except LaunchError as error:
        note = Note(UNKNOWN, message=error.message)
    status = read_status(run_dir, lambda: _word(run_dir, note))
    loss, source = _loss(status.records, status.state == DONE)
    return TrialStatus(**{**vars(status), "loss": loss}, source=source, starts=note.starts)


def _word(run_dir: Path, note: Note) -> Word:
    """Return the state of a trial by its note, and by the age of its record if another machine may run it."""
    metrics, alive = run_dir / "metrics.jsonl", note.alive()
    written = metrics.stat().st_mtime if metrics.exists() else 0.0
    noted = (run_dir / NOTE).stat().st_mtime if note.state not in (WAITING, RUNNING) else 0.0
    is_fresh = time.time() - written < FRESH_S and written > noted and not (run_dir / OUTCOME).exists()
    if alive or (is_fresh and alive is None and note.state != UNKNOWN):
        return Word(RUNNING)
    if note.state in (DIVERGED, FAILED, UNKNOWN):
        return Word(note.state, note.message or None)
    return Word(STOPPED if metrics.exists() or note.starts or (run_dir / OUTCOME).exists() else WAITING)


def _loss(records: Sequence[dict[str, Any]], done: bool) -> tuple[float | None, str]:
    """Return the loss that stands for a run and where it comes from."""
    end = records[-1] if done and records else {}
    if names := [name for name in end if name.startswith("val/") and name.endswith("/loss")]:
        values = [end[name] for name in names if end[name] is not None]
        mean = sum(values) / len(values) if len(values) == len(names) else None
        return mean, " ".join(name.removesuffix("/loss") for name in names)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    if not losses:
        return None, ""
    tail = losses[-_IN_MEAN:] if done else losses[-1:]
    return sum(tail) / len(tail), f"train, mean of {len(tail)}" if done else "train"


def as_trained(trials: Sequence[Trial], folder: Path) -> list[Trial]:
    """Return the trials, those that have begun with the configs in their run folders."""
    return [
        replace(trial, config=load_resolved(path)) if (path := _config(trial, folder)).exists() else trial
        for trial in trials
    ]


def require_same(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> None:
    """Check that the trials that have begun have the configs, and the text, that the sweep's file gives now.

    Raises:
        ConfigError: Naming every trial whose config has changed since, with the difference.
        DataError: If the data of trials that have begun has been replaced.
    """
    changed = []
    for trial in trials:
        path = _config(trial, folder)
        changes = diff(load_resolved(path), trial.config) if path.exists() else []
        if changes := [change for change in changes if not is_same_data(change)]:
            changed.append(f"trial {trial.name}:\n{format_diff(changes)}")
    if changed:
        text = "\n".join(changed).replace("\n", "\n    ")
        hint = "set them back, remove those trials' folders, or give the sweep another name"
        message = f"{display_path(sweep.path)} gives other configs to {len(changed)} trials that have begun\n    {text}"
        raise ConfigError(message, hint)
    _require_same_text(trials, folder)


def _require_same_text(trials: Sequence[Trial], folder: Path) -> None:
    """Check that the data lies here as trials have read it, as far as they have saved anything and it can be seen."""
    others = []
    for trial in trials:
        checkpoint = read_pointer(trial_folder(folder, trial) / "checkpoints")
        if checkpoint is None or (here := fingerprint_here(trial.config.data, trial.config.train.seq_len)) is None:
            continue
        with suppress(CheckpointError):  # the trial itself says what is wrong with it
            if read_manifest(checkpoint).identity.get("data", here) != here:
                others.append(trial)
    if others:
        paths = dict.fromkeys(str(source.path) for source in others[0].config.data.sources.values() if source)
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        message = f"the text in {', '.join(paths)} is not the one that trial {others[0].name}{more} has read"
        hint = "put the old text back, remove those trials' folders, or give the sweep another name"
        raise DataError(message, hint)


def is_same_data(change: Change, *, seen: bool = False) -> bool:
    """Tell whether a change names a data set elsewhere that is the same, as far as the old one is there to compare.

    With `seen` the old one has to be there.
    """
    if not is_other_place(change):
        return False
    before, after = (Path(path).expanduser() / "index.json" for path in change[1:])
    if not before.exists():
        return not seen
    return after.exists() and before.read_bytes() == after.read_bytes()


def _config(trial: Trial, folder: Path) -> Path:
    return trial_folder(folder, trial) / CONFIG
