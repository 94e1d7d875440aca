"""A request to train: everything a user decides about one start of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hopescale.config.layout import Layout
from hopescale.config.load import LoadedConfig

Resume = Literal["auto", "never", "must"] | Path
"""`auto` continues if there is a checkpoint, `never` refuses to, `must` refuses to begin anew; a path names a
checkpoint to continue from."""


@dataclass(frozen=True)
class RunRequest:
    """One start of a run, the same on every rank.

    Attributes:
        loaded: Recipe that has passed its checks.
        layout: Degrees of parallelism.
        folder: Run folder.
        overrides: Changes to the recipe as given on the command line, for the record.
        resume: Choice of the checkpoint to continue from.
        reset_optimizer: Whether to continue with the weights of a checkpoint and a new optimizer.
        init: Run folder or checkpoint whose weights a new run begins with; a run that has begun continues.
        branch_from: Run folder or checkpoint that a new run goes on from, with all of its state; a run that has begun
            continues.
        stop_at: Step to save and stop at, at most `train.steps`, without changing the learning rate's horizon; None is
            `train.steps`.
        profile: Number of steps of the first rank to record; None records none.
    """

    loaded: LoadedConfig
    layout: Layout
    folder: Path
    overrides: Sequence[str] = ()
    resume: Resume = "auto"
    reset_optimizer: bool = False
    init: Path | None = None
    branch_from: Path | None = None
    stop_at: int | None = None
    profile: int | None = None

    @property
    def last_step(self) -> int:
        """Step after which this start ends."""
        return self.loaded.config.train.steps if self.stop_at is None else self.stop_at

    def facts(self) -> dict[str, str]:
        """Return the values by name, apart from the config, that must be the same on every rank."""
        return {
            "the run folder": str(self.folder.absolute()),
            "--resume": str(self.resume),
            "--reset-optimizer": str(self.reset_optimizer),
            "--init": str(self.init),
            "--branch-from": str(self.branch_from),
            "--stop-at": str(self.stop_at),
        }
