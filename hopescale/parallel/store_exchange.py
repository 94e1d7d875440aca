"""Exchange of small values before there are groups: who is there, and whether all ranks were started for the same.

Ranks may be missing: a rank that is late is left out instead of waited for.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hopescale.common.errors import LaunchError

_POLL_S = 0.05


class StoreExchange:
    """Ranks that tell each other things through a store; every method is called by all of them, in the same order.

    A rank that did not come in time is not waited for again.

    Args:
        store: Store that rank 0 holds.
        rank: Number of this rank.
        num_ranks: Number of ranks that should come.
        wait_s: Seconds that rank 0 waits for the others, each time.

    Attributes:
        expected: Ranks that have come each time so far.
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
                pairs = [[rank, json.loads(self._store.get(self._key(rank)))] for rank in came]
                self._store.set(result, json.dumps(pairs))
            self._store.wait([result], timedelta(seconds=2 * self._wait_s))
            values = dict(json.loads(self._store.get(result)))
        except dist.DistError as error:
            raise LaunchError(f"rank 0 is not answering: {str(error).splitlines()[0]}") from error
        self.expected &= set(values)
        return values

    def compare(self, facts: Mapping[str, str]) -> None:
        """Make sure that all ranks that came were started for the same; a digest is compared first.

        Args:
            facts: Values by name that must be the same on all ranks, in the order in which differences are named.

        Raises:
            LaunchError: If another process is this rank too, or two ranks differ: on all ranks, the meeting is over.
        """
        if self._store.add(f"meeting/rank/{self.rank}", 1) > 1:
            message = f"another process is rank {self.rank} of {len(self.expected)} too"
            raise LaunchError(message, "two jobs meet at one address: give each a MASTER_PORT of its own")
        digests = self.gather(hashlib.sha256(json.dumps(facts).encode()).hexdigest())
        other = next((rank for rank, digest in digests.items() if digest != digests[0]), None)
        if other is None:
            return
        mine, others = (self.gather(dict(facts) if self.rank in (0, other) else None).get(rank) for rank in (0, other))
        self.leave()
        if mine is None or others is None:
            raise LaunchError(f"ranks 0 and {other} were started for different things, and one of them is gone")
        error = LaunchError(
            _first_difference(mine, others, other),
            "all ranks need the same command, code and packages; two jobs at one address need ports of their own",
        )
        error.repeated = self.rank not in (0, other)
        raise error

    def leave(self) -> None:
        """Let rank 0, and the store with it, stay until the others have read their messages."""
        self._round += 1
        with suppress(dist.DistError):  # without rank 0 there is nothing left to read
            self._store.set(self._key(self.rank), "null")
            if self.rank == 0:
                self._who_comes()

    def _key(self, rank: int) -> str:
        return f"meeting/{self._round}/{rank}"

    def _who_comes(self) -> set[int]:
        """Wait for the ranks that are expected; return those that are there at the end."""
        missing, deadline = set(self.expected), time.monotonic() + self._wait_s
        while missing := {rank for rank in missing if not self._store.check([self._key(rank)])}:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        return self.expected - missing


def _first_difference(zero: Mapping[str, str], others: Mapping[str, str], other: int) -> str:
    """Name the first value that rank 0 and another rank do not share, with both values."""
    names = [*zero, *(name for name in others if name not in zero)]
    name = next(name for name in names if zero.get(name) != others.get(name))
    values = [repr(values[name]) if name in values else "no such value" for values in (zero, others)]
    return f"ranks of different runs meet: {name} is {values[0]} on rank 0, {values[1]} on rank {other}"
