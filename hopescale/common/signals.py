"""Signals that ask a run to stop: held back until something listens."""

from __future__ import annotations

import signal

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
