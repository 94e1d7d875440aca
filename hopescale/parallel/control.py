"""Agreement of the ranks of a job: small messages over the CPU, between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hopescale.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    HopescaleError,
    LaunchError,
)

T = TypeVar("T")
_ERRORS = {error.exit_code: error for error in (ConfigError, DataError, CheckpointError, LaunchError, DivergedError)}
_MAX_RANKS = 1 << 20


class Control:
    """Agreement of all ranks; every method is called by all of them, in the same order.

    Args:
        group: Process group of all ranks on the CPU.

    Attributes:
        verdict: Exit code of the failure that `agree` has met, the highest of all ranks'; 0 is none.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank, self.num_ranks = self._group.rank(), self._group.size()
        self.verdict = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes the record."""
        return self.rank == 0

    def broadcast_from_rank0(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its result everywhere; it must pickle.

        Raises:
            HopescaleError: The function's own error, on every rank.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except HopescaleError as error:
                outcome[1] = error
        if self.num_ranks > 1:
            sent = [outcome[0], outcome[1] and outcome[1].exit_code]
            dist.broadcast_object_list(sent, src=0, group=self._group)
            outcome = [sent[0], outcome[1] or self._failure(sent[1], 0)]
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_ranks_or_raise(self, function: Callable[[], T]) -> T:
        """Call a function that communicates nothing on every rank, and return each rank's result.

        Raises:
            HopescaleError: The function's own error if it failed on this rank, else the news that it failed on another.
        """
        result, error = None, None
        try:
            result = function()
        except HopescaleError as failure:
            error = failure
        failures = self.gather(error and (error.exit_code, str(error)))
        if error is not None:
            error.repeated = failures.index((error.exit_code, str(error))) < self.rank
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise self._failure(failure[0], rank)
        return result

    def agree(self, stop: str | None, error: HopescaleError | None) -> str | None:
        """Return the name of a signal that any rank was sent, or None.

        Args:
            stop: Signal this rank was sent.
            error: Failure of this rank, which has not been raised yet.

        Raises:
            HopescaleError: This rank's own failure, or one of the same kind that names the rank which failed.
        """
        if self.num_ranks == 1:
            if error is not None:
                self.verdict = error.exit_code
                raise error
            return stop
        failure = 0 if error is None else error.exit_code * _MAX_RANKS + self.rank
        seen = torch.tensor([signal.Signals[stop].value if stop else 0, failure])
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self._group)
        number, failure = seen.tolist()
        self.verdict, rank = divmod(failure, _MAX_RANKS)
        if error is not None:
            raise error
        if failure:
            raise self._failure(self.verdict, rank)
        return signal.Signals(number).name if number else None

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of ranks, on all of them."""
        values: list[Any] = [value] * self.num_ranks
        if self.num_ranks > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def _failure(self, exit_code: int | None, rank: int) -> HopescaleError | None:
        if exit_code is None:
            return None
        error = _ERRORS.get(exit_code, HopescaleError)(f"rank {rank} failed; its own message says why")
        error.repeated = not self.is_first or rank == 0
        return error
