"""A view of a run's metrics for people to look at; `metrics.jsonl` is the record, this can be lost."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from hopescale.common.errors import HopescaleError


class TensorBoardTracker:
    """TensorBoard event files, one folder for the whole of a run.

    Args:
        folder: `tb/` of the run; made if missing.
        resume_step: Step the run continues from; TensorBoard hides what the folder holds of later steps. None hides
            everything before.

    Raises:
        HopescaleError: If the folder cannot be written, now or later.
    """

    def __init__(self, folder: Path, *, resume_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        first = 0 if resume_step is None else resume_step + 1
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first)
        except OSError as error:
            raise self._failure(error) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step so that a running TensorBoard sees them."""
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Close the event file."""
        # `log` flushes, so only what it has already reported can fail here.
        with contextlib.suppress(OSError):
            self._writer.close()

    def _failure(self, error: OSError) -> HopescaleError:
        hint = "free some space, or set log.tensorboard=false and repeat the command"
        return HopescaleError(f"cannot write {self.folder}: {error.strerror}", hint)
