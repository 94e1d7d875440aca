"""Sums over replicas that begin in a backward pass, each as soon as all of its gradients are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence


class EarlySums:
    """Begins sums in one order on all ranks, each when its last gradient has come and those before it have begun.

    Replicas need not complete their gradients in the same order, but exchanges of one group of ranks must begin so.
    """

    def __init__(self) -> None:
        self._begin: Callable[[Sequence[str]], None] = lambda names: None
        self._queue: deque[tuple[Sequence[str], set[str]]] = deque()
        self._missing: dict[str, set[str]] = {}

    def expect(self, sums: Iterable[Sequence[str]], begin: Callable[[Sequence[str]], None]) -> None:
        """Begin sums from now on, in the order given, by a function that takes their parameters.

        No gradient of theirs may come after its sum has begun.
        """
        self._begin = begin
        self._queue = deque((names, set(names)) for names in sums)
        self._missing = {name: missing for names, missing in self._queue for name in names}

    def arrive(self, name: str) -> None:
        """Note that a gradient has arrived, and begin the sum that it completes."""
        missing = self._missing.get(name)
        if missing is None:
            return
        assert name in missing, f"{name} has a second gradient in the last backward pass of a step"
        missing.remove(name)
        while self._queue and not self._queue[0][1]:
            self._begin(self._queue.popleft()[0])

    def begin_rest(self) -> None:
        """Begin the sums that have not begun, after the backward pass: some parameters may have no gradient."""
        self._missing = {}
        while self._queue:
            self._begin(self._queue.popleft()[0])
