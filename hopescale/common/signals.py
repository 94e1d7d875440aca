"""Signals that ask a run to stop: held back until something listens."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def hold() -> None:
    """Keep these signals waiting, for this process and those it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def release() -> None:
    """Let them through, and those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def stopping() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a run to stop; SIGHUP is none where `nohup` has it ignored."""
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asked, signal.SIGHUP)


@contextmanager
def unwinding() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave a block as an exception does, so that it can tidy up, and then end the process.

    Signals that are ignored, or that somebody else handles, stay as they are.
    """
    ends = (signal.SIGTERM, signal.SIGHUP)
    mine = [number for number in ends if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        mine = []
    received: list[int] = []

    def leave(number: int, _: FrameType | None) -> None:
        if not received:  # a second one must not interrupt the tidying up
            received.append(number)
            raise SystemExit(128 + number)

    for number in mine:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])
