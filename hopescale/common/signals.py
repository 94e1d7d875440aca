"""Signals that ask a run to stop: held back until something listens, noted by who passes them on."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that are passed on to every process."""

_PR_SET_PDEATHSIG = 1
_HELD = (signal.SIGTERM, signal.SIGUSR1)


def hold() -> None:
    """Keep these signals waiting, for this process and those it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def release() -> None:
    """Let them through, and those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


@contextmanager
def noted(received: list[int]) -> Iterator[None]:
    """Note signals that are to be passed on, instead of dying of them."""
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in FORWARDED}
    release()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def follow_parent() -> Callable[[], int] | None:
    """Return what a new process calls so as to get SIGTERM when its parent dies; None where there is no such call."""
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM) if sys.platform == "linux" else None
