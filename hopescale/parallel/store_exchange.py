"""Exchange of small values in which ranks may be missing: a rank that is late is left out instead of waited for."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hopescale.common.errors import LaunchError

_POLL_S = 0.05


class StoreExchange:
    """Ranks that tell each other things through a store; every method is called by all of them, in the same order.

    A rank that did not come in time is not waited for again.

    Args:
        store: Held by rank 0.
        rank: This rank.
        num_ranks: How many there should be.
        wait_s: Seconds that rank 0 waits for the others, each time.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, wait_s: float):
        self.rank, self.expected = rank, set(range(num_ranks))
        self._store, self._wait_s, self._round = store, wait_s, 0

    def gather(self, value: Any) -> dict[int, Any]:
        """Return the values of the ranks that came in time, by rank; the same on all of them. JSON carries them.

        Raises:
            LaunchError: If rank 0 is no longer there.
        """
        self._round += 1
        result = f"meeting/{self._round}/all"
        try:
            self._store.set(self._key(self.rank), json.dumps(value))
            if self.rank == 0:
                came = sorted(self._who_comes())
                self._store.set(result, json.dumps([[rank, self._value(rank)] for rank in came]))
            self._store.wait([result], timedelta(seconds=2 * self._wait_s))
            values = dict(json.loads(self._store.get(result)))
        except dist.DistError as error:
            raise LaunchError(f"rank 0 is not answering: {str(error).splitlines()[0]}") from error
        self.expected &= set(values)
        return values

    def leave(self) -> None:
        """Let rank 0, and the store with it, stay until the others have read what they were told."""
        self._round += 1
        self._store.set(self._key(self.rank), "null")
        if self.rank == 0:
            self._who_comes()

    def _key(self, rank: int) -> str:
        return f"meeting/{self._round}/{rank}"

    def _value(self, rank: int) -> Any:
        return json.loads(self._store.get(self._key(rank)))

    def _who_comes(self) -> set[int]:
        """Wait for the ranks that are expected; return those that are there at the end."""
        missing, deadline = set(self.expected), time.monotonic() + self._wait_s
        while missing := {rank for rank in missing if not self._store.check([self._key(rank)])}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return self.expected - missing
