"""The trials of a sweep as processes of this machine, a few at a time: started, retried, recorded, stopped in order."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from hopescale.common import disk
from hopescale.common.children import Child, signal_name, start_child, supervised, threads_each
from hopescale.common.errors import ConfigError, DataError, DivergedError, LaunchError, StoppedEarly
from hopescale.common.units import format_duration
from hopescale.config.layout import smallest_layout
from hopescale.observe.run_status import DIVERGED, DONE, FAILED, RUNNING, STOPPED, is_locked
from hopescale.sweep.progress import (
    Note,
    branch_checkpoint,
    can_start,
    is_chosen,
    lost_with_trunk,
    read_note,
    status_in_sweep,
    trial_folder,
    trial_status,
    write_note,
)
from hopescale.sweep.trial import Trial

LOG = "train.log"
"""Output of a trial's process, in its run folder; every start appends."""

SETTLED = (ConfigError.exit_code, DataError.exit_code)
"""Exit codes of failures that a second try would repeat."""

_POLL_S = 0.1
_SHOW_S = 1.0

Say = Callable[[str], None]


def train_words(trial: Trial, run_dir: Path) -> list[str]:
    """Return the arguments of `hopescale` that train a trial, or continue it, on ranks that something else starts.

    The first start of a branch needs the checkpoint of its trunk.
    """
    begin = ["--branch-from", str(branch_checkpoint(run_dir, trial.branch))] if trial.branch else []
    return ["train", str(trial.recipe), *trial.overrides, "--run-dir", str(run_dir), *begin]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder, which is made if missing.

    Raises:
        LaunchError: If another process holds it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(disk.locked(folder / ".lock"))
        except BlockingIOError as error:
            hint = "wait for it, or stop it"
            raise LaunchError(f"sweep folder {folder} is in use by another process", hint) from error
        except OSError as error:
            raise LaunchError(f"cannot write the sweep folder {folder}: {error.strerror}") from error
        yield


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    jobs: int,
    retries: int,
    environ: Mapping[str, str],
    report: Say,
    show: Callable[[], None],
) -> None:
    """Train the trials that are not done, `jobs` at a time; call it from the main thread, with the folder locked.

    Each trial is a process of `hopescale train`, which continues from its last checkpoint. A branch waits until its
    trunk has come to its step. Trials that are done or have diverged are left alone. One that fails is started again,
    up to `retries` times, unless its config or its data are at fault. SIGTERM, SIGHUP and SIGINT stop all trials, which
    save their state; a second SIGINT kills them. They are also asked to stop when this process dies. Threads are
    distributed among `jobs` where `environ` does not set their number. `report` takes each line about a trial, and
    `show` is called about every second, as long as trials run.

    Raises:
        StoppedEarly: If a signal ended it; the same call goes on.
        LaunchError: If trials failed more often than they may, once all others have ended.
    """
    pool = _Pool(folder, retries, {"OMP_NUM_THREADS": str(threads_each(jobs)), **environ}, report)
    pool.enqueue(trials)
    with supervised(pool.children) as received:
        _loop(pool, received, jobs, show)
    if received:
        begun = f"{signal_name(received[0])}: {pool.left()} of {len(trials)} trials are not done"
        raise StoppedEarly(begun, "the same command goes on with them")
    if pool.failed:
        logs = "\n".join(f"    {folder / 'trials' / name / LOG}: {why}" for name, why in pool.failed.items())
        count = f"{len(pool.failed)} of {len(trials)} trials failed"
        raise LaunchError(f"{count}\n{logs}", "mend the cause; the same command tries them again")


def _loop(pool: _Pool, received: list[int], jobs: int, show: Callable[[], None]) -> None:
    shown, told = 0.0, 0
    while pool.running or (pool.queue and not received):
        if len(received) > told:
            told = len(received)
            pool.stop(kill=received.count(signal.SIGINT) > 1)
        if not received:
            pool.start(jobs - len(pool.running))
        pool.reap()
        if time.monotonic() - shown > _SHOW_S:
            show()
            shown = time.monotonic()
        time.sleep(_POLL_S)
    show()


class _Pool:
    """The trials that wait, those that run, and those that failed for good."""

    def __init__(self, folder: Path, retries: int, environ: Mapping[str, str], report: Say):
        self.folder, self.retries, self.environ, self.report = folder, retries, environ, report
        self.queue: list[Trial] = []
        self.running: dict[str, Trial] = {}
        self.children: list[Child] = []
        self.failed: dict[str, str] = {}
        self.stopping = False
        self._waited_for: set[str] = set()

    def enqueue(self, trials: Sequence[Trial]) -> None:
        """Take the trials that are to be trained, and forget how often they failed in earlier calls."""
        for trial in trials:
            run_dir = trial_folder(self.folder, trial)
            if trial_status(run_dir).state not in (DONE, DIVERGED):
                if (note := read_note(run_dir)).failures:
                    write_note(run_dir, replace(note, failures=0))
                self.queue.append(trial)

    def left(self) -> int:
        """Count the trials that are to be trained still."""
        return len(self.queue) + len(self.running) + len(self.failed)

    def start(self, places: int) -> None:
        """Start trials in as many free places.

        Those wait whose folder another process still holds, and branches for the step of their trunk.
        """
        for trial in list(self.queue):
            if places < 1:
                return
            run_dir = trial_folder(self.folder, trial)
            if not trial.is_candidate and not is_chosen(trial, self.folder):
                self._wait_for_choice(trial)
                continue
            if not can_start(run_dir, trial):
                self._give_up_without_trunk(trial, run_dir)
                continue
            if is_locked(run_dir):
                if trial.name not in self._waited_for:
                    self.report(f"{trial.name}: waiting for a process that still trains it")
                    self._waited_for.add(trial.name)
                continue
            self.queue.remove(trial)
            self._start(trial, run_dir)
            places -= 1

    def _wait_for_choice(self, trial: Trial) -> None:
        """Take a trial from the queue that is left out, or whose choice cannot be made now."""
        if is_chosen(trial, self.folder) is False:
            self.queue.remove(trial)
        elif not any(other.name in trial.choice.among for other in [*self.running.values(), *self.queue]):
            self.queue.remove(trial)
            self.failed[trial.name] = f"waits for a choice among {', '.join(trial.choice.among)}, which failed in part"

    def _give_up_without_trunk(self, trial: Trial, run_dir: Path) -> None:
        """End a branch whose trunk will not come to its step; a run of its own would have diverged likewise.

        That it has diverged stays its trunk's word alone, so that it begins when the trunk is tried again.
        """
        if any(other.name == trial.branch.trunk for other in [*self.running.values(), *self.queue]):
            return
        word = lost_with_trunk(trial, self.folder, ended=None)
        if word is None:
            return  # its step has come meanwhile
        self.queue.remove(trial)
        if word.state == FAILED:
            self.failed[trial.name] = word.reason
            write_note(run_dir, Note(FAILED, failures=1, message=word.reason))
        self.report(f"{trial.name}: {word.state}: {word.reason}")

    def _start(self, trial: Trial, run_dir: Path) -> None:
        nproc = smallest_layout(trial.config).num_ranks
        ranks = ["--nproc", str(nproc)] if nproc > 1 else []
        words = [sys.executable, "-m", "hopescale", *train_words(trial, run_dir), *ranks]
        note = read_note(run_dir)
        write_note(run_dir, note)
        try:
            with (run_dir / LOG).open("ab") as log:
                log.write(f"$ {shlex.join(words)}\n".encode())
                log.flush()
                child = start_child(f"trial {trial.name}", words, self.environ, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise LaunchError(f"cannot write {run_dir / LOG}: {error.strerror}") from error
        self.children.append(child)
        self.running[child.name] = trial
        begun = replace(note, state=RUNNING, starts=note.starts + 1, host=socket.gethostname(), pid=child.process.pid)
        write_note(run_dir, begun)
        self.report(f"{trial.name}: started" + (f" again ({begun.starts} starts)" if note.starts else ""))

    def stop(self, *, kill: bool) -> None:
        """Ask all trials to save and end, or end them at once."""
        self.stopping = True
        names = ", ".join(trial.name for trial in self.running.values())
        self.report(f"{'killing' if kill else 'stopping'} {names or 'nothing: no trial runs'}")
        for child in self.children:
            child.stop(signal.SIGKILL if kill else signal.SIGTERM)

    def reap(self) -> None:
        """Record the trials that have ended; put those that may try again at the end of the queue."""
        for child in [child for child in self.children if not child.running()]:
            self.children.remove(child)
            self._record(self.running.pop(child.name), child)

    def _record(self, trial: Trial, child: Child) -> None:
        run_dir, code = trial_folder(self.folder, trial), child.process.returncode
        note, took = read_note(run_dir), format_duration(time.monotonic() - child.begin_s)
        status = status_in_sweep(trial, self.folder)
        if code == 0 and status.state == DONE:
            write_note(run_dir, replace(note, state=DONE))
            loss = "no loss" if status.loss is None else f"loss {status.loss:.4f} ({status.source})"
            self.report(f"{trial.name}: done, {loss}, {took}")
        elif code == StoppedEarly.exit_code or (code < 0 and self.stopping):
            write_note(run_dir, replace(note, state=STOPPED))
            self.queue.append(trial)
            self.report(f"{trial.name}: stopped after {took}")
        else:
            self._record_failure(trial, run_dir, code, note)

    def _record_failure(self, trial: Trial, run_dir: Path, code: int, note: Note) -> None:
        why = _reason(run_dir / LOG, code)
        if code == DivergedError.exit_code:
            write_note(run_dir, replace(note, state=DIVERGED, message=why))
            self.report(f"{trial.name}: diverged: {why}")
            return
        note = replace(note, state=FAILED, failures=note.failures + 1, message=why)
        write_note(run_dir, note)
        self.report(f"{trial.name}: failed: {why}")
        if code in SETTLED or note.failures > self.retries:
            self.failed[trial.name] = why
        else:
            self.queue.append(trial)


def _reason(log: Path, code: int) -> str:
    """Say in one line why a trial failed: the first line of its message, else its exit code."""
    if code < 0:
        return f"died with {signal_name(-code)}"
    if code == 0:
        return "ended with exit code 0 before its last step"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-50:]
    start = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    messages = [line.strip() for line in lines[start + 1 :] if line.startswith("  ") and not line.startswith("    ")]
    return f"{messages[-1] if messages else 'see its log'} (exit code {code})"
