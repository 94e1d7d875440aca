"""Several processes of one command on this machine: started together, signalled together, ended together."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import IO

from hopescale.common.children import Child, signal_name, start_child, supervised, threads_each
from hopescale.common.errors import HopescaleError, StoppedEarly
from hopescale.common.rank_info import RankInfo
from hopescale.launch.environment import child_environ

ORDERLY = (0, StoppedEarly.exit_code)
"""Exit codes after which the other processes may take their time, perhaps to finish a checkpoint."""

EXPLAINED = frozenset(error.exit_code for error in HopescaleError.__subclasses__()) - {HopescaleError.exit_code}
"""Exit codes of a process that has said why it ended; any other failure has that of the base."""

SAME_TIME_S = 2.0
"""Failures no further apart than this have one cause; an explained one tells more of it."""

_ADDRESS = "127.0.0.1"
_POLL_S = 0.05
_DRAIN_S = 2.0

Say = Callable[[str], None]


def run_local(
    command: Sequence[str],
    nproc: int,
    *,
    environ: Mapping[str, str],
    report: Say,
    relay: Say,
    grace_s: float = 15.0,
) -> int:
    """Run `nproc` processes of a command until all have ended; call it from the main thread.

    Each finds its place in the variables torchrun would set. SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on.
    Processes stand in sessions of their own, so a Ctrl-C reaches each once; on Linux they get SIGTERM when this process
    dies. When one fails, the others have `grace_s` to end themselves; then SIGTERM is sent, and SIGKILL after as long
    again. A second SIGINT sets the same clock running.

    Standard output is this process's, and so is standard error of rank 0.

    Args:
        command: Program and arguments.
        nproc: Number of processes.
        environ: Environment variables, to which their place and a number of threads are added.
        report: Listener for each line about a process that failed.
        relay: Listener for each line of standard error of the ranks above 0, marked `[rank N]`.
        grace_s: Seconds before each stronger signal.

    Returns:
        0 if all succeeded; else the exit code of the first that failed by itself, 128 + n for signal n. Of failures
        within two seconds an explained one counts. Being stopped early, 75, counts only where nothing went wrong.

    Raises:
        LaunchError: If a process cannot be started.
    """
    children: list[Child] = []
    with _reserved_port() as port, supervised(children) as received:
        for rank in range(nproc):
            rank_info = RankInfo(rank, nproc, rank, _ADDRESS, port)
            own, stderr = child_environ(environ, rank_info, threads_each(nproc)), subprocess.PIPE if rank else None
            children.append(start_child(f"rank {rank}", command, own, stderr=stderr))
        readers = [
            Thread(target=_pass_on, args=(child.process.stderr, rank, relay), daemon=True)
            for rank, child in enumerate(children)
            if rank
        ]
        for reader in readers:
            reader.start()
        _wait(children, received, report, grace_s)
        for reader in readers:
            reader.join(_DRAIN_S)
    return _outcome(children)


def _pass_on(stream: IO[bytes], rank: int, relay: Say) -> None:
    """Pass on the lines of a process's standard error until it is closed."""
    prefix, prefix_of_torch = f"[rank {rank}] ", f"[rank{rank}]: "
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        _tell(relay, text if text.startswith((prefix, prefix_of_torch)) else prefix + text)


def _tell(listener: Say, line: str) -> None:
    """Say a line to whoever still listens: a terminal that is gone must not hold up or end the processes."""
    with suppress(OSError):
        listener(line)


def _wait(children: list[Child], received: list[int], report: Say, grace_s: float) -> None:
    """Wait until all have ended: pass signals on, and stop what is left over by a failure."""
    interrupts, cause, deadline = 0, None, None
    stronger = [signal.SIGTERM, signal.SIGKILL]
    while running := [child for child in children if child.running()]:
        for number in [received.pop(0) for _ in range(len(received))]:
            interrupts += number == signal.SIGINT
            for child in running:
                child.process.send_signal(number)
        if cause is None:
            failed = [child for child in children if child.ended_s is not None and child.code not in ORDERLY]
            cause = str(failed[0]) if failed else "the second interrupt" if interrupts > 1 else None
            if cause is not None:
                deadline = time.monotonic() + grace_s
            if failed and failed[0].code not in EXPLAINED:
                _tell(report, f"{cause}; stopping the others")
        elif stronger and time.monotonic() > deadline:
            number = stronger.pop(0)
            ranks = ", ".join(child.name.removeprefix("rank ") for child in running)
            _tell(report, f"still running after {cause}: rank {ranks}; sending {signal_name(number)}")
            for child in running:
                child.stop(number)
            deadline = time.monotonic() + grace_s
        time.sleep(_POLL_S)


def _outcome(children: list[Child]) -> int:
    failed = sorted((child for child in children if child.code and not child.stopped), key=lambda child: child.ended_s)
    wrong = [child for child in failed if child.code not in ORDERLY]
    if not wrong:
        if failed:
            return failed[0].code
        return 128 + signal.SIGINT if any(child.stopped for child in children) else 0
    near = [child.code for child in failed if abs(child.ended_s - wrong[0].ended_s) <= SAME_TIME_S]
    explained = [code for code in near if code in EXPLAINED]
    return min(explained, key=lambda code: code in ORDERLY, default=wrong[0].code)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Hold a free port that no other process is given, and that a process which asks for it by number can listen on."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_ADDRESS, 0))
        yield listener.getsockname()[1]
