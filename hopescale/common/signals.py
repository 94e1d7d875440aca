"""Signals that ask a run to stop: held back until something listens."""

from __future__ import annotations

import signal

_HELD = (signal.SIGTERM, signal.SIGUSR1)


def hold() -> None:
    """Keep these signals waiting, for this process and those it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def release() -> None:
    """Let them through, and those that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
