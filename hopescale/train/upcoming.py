"""Micro batches of the steps to come, which are read while the device computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

from hopescale.common.errors import HopescaleError
from hopescale.data.loader import Batch


class Upcoming:
    """Reads the micro batches of a replica, steps ahead.

    Fewer are left where the run ends, and none behind those that cannot be read.

    Args:
        batches: Micro batches of the next step and of those behind it.
        per_step: Micro batches of a step.

    Attributes:
        failure: Reason for which the step behind those that have been read has none; None as long as there is none.
        seconds: Time that the last call of `read` took.
    """

    def __init__(self, batches: Iterator[Batch], per_step: int):
        self._batches, self._per_step = batches, per_step
        self._steps: deque[list[Batch]] = deque()
        self.failure: HopescaleError | None = None
        self.seconds = 0.0

    def read(self, steps: int) -> None:
        """Read until so many steps have their micro batches."""
        begin = time.perf_counter()
        try:
            while self.failure is None and len(self._steps) < steps:
                self._steps.append(list(islice(self._batches, self._per_step)))
        except HopescaleError as error:
            self.failure = error
        self.seconds = time.perf_counter() - begin

    def take(self) -> list[Batch]:
        """Return the micro batches of the next step, which have been read."""
        return self._steps.popleft()

    @property
    def lacks_next(self) -> HopescaleError | None:
        """Why the next step has no micro batches; None if it has, or if they have not been read."""
        return None if self._steps else self.failure

    def close(self) -> None:
        """Read no more."""
        self._batches.close()
