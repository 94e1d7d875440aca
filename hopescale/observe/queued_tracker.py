"""A tracker of a service, asked from a thread of its own: a run never waits for it, and goes on with it when it can."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

logger = logging.getLogger(__name__)

ROOM = 1000
"""Records that may wait for a service; more are dropped."""

WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds before each new try of a record, which is dropped after the last."""

PATIENCE = 30.0
"""Seconds that the end of a run waits for what is not sent."""


class Tracker(ABC):
    """A view of one run that a service or a program draws.

    A run that continues goes on with the view it had; what it holds of later steps is drawn over or hidden.
    """

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step."""

    def log_values(self, step: int, values: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Show the distribution of many values of a step, where the view has such."""

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:  # noqa: B027
        """Show texts of a step, where the view has such."""

    def go_back(self, step: int) -> None:  # noqa: B027
        """Hide records of later steps, where the view does not draw over them by itself."""

    @abstractmethod
    def close(self) -> None:
        """Finish the records under way."""


class QueuedTracker(Tracker):
    """A tracker whose calls wait in a queue for a thread, which opens the tracker too.

    A record that fails is tried again after a while, with the tracker opened anew. One that finds the queue full, or
    fails too often, is dropped: the first time is logged as a warning, and the number when the run ends.

    Args:
        name: Name in messages.
        make: Function that opens the tracker, also again after a failure.
        room: Records that may wait.
        waits: Seconds before each new try of a record.
        patience: Seconds that `close` waits.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        *,
        room: int = ROOM,
        waits: Sequence[float] = WAITS,
        patience: float = PATIENCE,
    ):
        self._name, self._make, self._waits, self._patience = name, make, waits, patience
        self._waiting: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(room)
        self._tracker: Tracker | None = None
        self._given = self._sent = 0
        self._has_failed = self._has_dropped = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the values of a step."""
        self._put(lambda tracker, values=dict(values): tracker.log(step, values))

    def log_values(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Drop distributions: no service has a view of them."""

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Queue texts of a step."""
        self._put(lambda tracker, texts=dict(texts): tracker.log_texts(step, texts))

    def close(self) -> None:
        """Wait a while until all is sent, say how much is not, and leave the rest."""
        self._closing.set()
        with contextlib.suppress(queue.Full):  # the thread ends when nothing waits any more
            self._waiting.put_nowait(None)
        self._thread.join(self._patience)
        if lost := self._given - self._sent:
            logger.warning("%d of %d records have not reached %s", lost, self._given, self._name)

    def _put(self, call: Callable[[Tracker], None]) -> None:
        self._given += 1
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._drop(f"{self._waiting.maxsize} records wait already")

    def _drop(self, why: object) -> None:
        if not self._has_dropped:
            self._has_dropped = True
            logger.warning("a record for %s is dropped, and so may be others: %s", self._name, why)

    def _run(self) -> None:
        self._try(lambda _: None)  # a service that cannot be reached is told of at the start
        while not (self._closing.is_set() and self._waiting.empty()):
            if (call := self._waiting.get()) is None:
                break
            self._sent += self._try(call)
        if self._tracker is not None:
            self._try(lambda tracker: tracker.close())

    def _try(self, call: Callable[[Tracker], None]) -> bool:
        """Make a call until it succeeds or has failed too often; return whether it has succeeded."""
        for wait in (*self._waits, None):
            try:
                self._tracker = self._tracker or self._make()
                call(self._tracker)
                return True
            except Exception as error:  # whatever a client of a service raises
                self._tracker = None
                if not self._has_failed:
                    self._has_failed = True
                    logger.warning("%s has failed, it is tried again while the run goes on: %s", self._name, error)
                if wait is None or self._closing.is_set():
                    self._drop(error)
                    return False
                self._closing.wait(wait)
        raise AssertionError
