"""The record of a run: `metrics.jsonl`, and TensorBoard as a view of it."""

from __future__ import annotations

from collections.abc import Mapping

from hopescale.config.schema import LogConfig
from hopescale.observe.metrics import MetricsLog
from hopescale.observe.trackers import TensorBoardTracker, Tracker
from hopescale.train.folder import RunFolder


class Record:
    """Writes each step's values to every place that keeps them; a context manager.

    Args:
        folder: The run's.
        config: Whether there is a TensorBoard view.
        resume_step: Step the run continues from, whose later records are dropped; None begins anew.
    """

    def __init__(self, folder: RunFolder, config: LogConfig, *, resume_step: int | None):
        self._metrics = MetricsLog(folder.metrics, resume_step=resume_step)
        self._trackers: list[Tracker] = []
        if config.tensorboard:
            self._trackers.append(TensorBoardTracker(folder.path / "tb", resume_step=resume_step))

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()

    def log(self, step: int, tokens_seen: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step; the file comes first, as a full disk is reported there in one message."""
        self._metrics.log(step, tokens_seen, values)
        for tracker in self._trackers:
            tracker.log(step, values)
