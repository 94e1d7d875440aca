"""Processes that a command starts and supervises on this machine: started, signalled, ended together."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from hopescale.common.errors import LaunchError
from hopescale.common.paths import PACKAGE
from hopescale.common.signals import release, stopping

_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One process, under the name that messages give it."""

    name: str
    process: subprocess.Popen[bytes]
    ended_s: float | None = None
    """Time when it was found to have ended, by the monotonic clock; None before."""
    stopped: bool = False
    """Whether `stop` has ended it."""
    begin_s: float = field(default_factory=time.monotonic)

    def running(self) -> bool:
        """Look whether the process is running."""
        if self.ended_s is None and self.process.poll() is not None:
            self.ended_s = time.monotonic()
        return self.ended_s is None

    @property
    def code(self) -> int:
        """Exit code as a shell gives it: 128 + n for signal n."""
        code = self.process.returncode
        return code if code >= 0 else 128 - code

    def stop(self, number: int) -> None:
        """Send a signal that is to end the process; SIGKILL ends all that it has started as well, at once."""
        if not self.running():
            return
        self.stopped = True
        if number != signal.SIGKILL:
            self.process.send_signal(number)
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __str__(self) -> str:
        text, code = f"{self.name} (pid {self.process.pid})", self.process.returncode
        if code is None:
            return text
        return f"{text} died with {signal_name(-code)}" if code < 0 else f"{text} ended with exit code {code}"


def start_child(
    name: str,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdout: IO[bytes] | None = None,
    stderr: int | None = None,
) -> Child:
    """Start a process in a session of its own, so that a Ctrl-C reaches it once, through this one.

    On Linux it gets SIGTERM when this process dies. Messages call it by its name. It writes to this process's standard
    output and error, unless there is a file, or `subprocess.PIPE` or `STDOUT`, for them.

    Raises:
        LaunchError: If it cannot be started.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_with_own_code(environ),
            start_new_session=True,
            preexec_fn=_follow_parent(),
        )
    except OSError as error:
        raise LaunchError(f"cannot start {name}, {command[0]}: {error.strerror}") from error
    return Child(name, process)


@contextmanager
def supervised(children: list[Child]) -> Iterator[list[int]]:
    """Note signals instead of dying of them, and kill the children that are left at the end.

    Yields:
        The signals that have been received so far, for the caller to pass on.
    """
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in stopping()}
    release()
    try:
        try:
            yield received
        finally:
            for child in children:
                child.stop(signal.SIGKILL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _with_own_code(environ: Mapping[str, str]) -> dict[str, str]:
    """Let a child import the same modules as this process: no file of its working directory shadows one."""
    safe = {**environ, "PYTHONSAFEPATH": "1"}
    if Path(sys.path[0] or ".").resolve() == PACKAGE.parent:  # a checkout that was found by the working directory
        safe["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE.parent), environ.get("PYTHONPATH"))))
    return safe


def signal_name(number: int) -> str:
    """Return the name of a signal, as `SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def threads_each(num_processes: int) -> int:
    """Return the number of threads for each of several processes, on the cores that this one may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_processes)


def _follow_parent() -> Callable[[], int] | None:
    """Return the call that has a new process end with its parent; None on a system without such a call."""
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM) if sys.platform == "linux" else None
