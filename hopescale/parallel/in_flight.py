"""Exchanges between ranks that go on while something else is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch.distributed as dist

AT_ONCE = 2
"""Exchanges that may be under way together; each holds its buffers until it is finished."""


class InFlight:
    """Exchanges that have begun, finished in the order in which they began. All ranks begin them in the same order."""

    def __init__(self) -> None:
        self._begun: deque[tuple[dist.Work, Callable[[], None]]] = deque()

    def add(self, work: dist.Work, finish: Callable[[], None]) -> None:
        """Take an exchange that `async_op=True` began, after waiting for the earliest if there are too many.

        `finish` is called when it is complete, and keeps its buffers until then.
        """
        self._begun.append((work, finish))
        if len(self._begun) > AT_ONCE:
            self._finish_one()

    def wait(self) -> None:
        """Finish all."""
        while self._begun:
            self._finish_one()

    def _finish_one(self) -> None:
        work, finish = self._begun.popleft()
        work.wait()
        finish()
