"""Being asked to stop: signals set a flag, the loop reads it between two steps."""

from __future__ import annotations

import signal
from types import FrameType

from hopescale.common import signals


class StopRequest:
    """Whether a signal has asked the run to stop; a context manager that installs and restores the handlers.

    SIGTERM and SIGUSR1 come from schedulers, SIGINT from a keyboard, SIGHUP from a terminal that is closed, unless it
    is ignored, as `nohup` has it. A second SIGINT interrupts at once. Those held back until now are let through.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in signals.stopping():
            self._previous[number] = signal.signal(number, self._note)
        signals.release()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
