"""Views of a run's metrics for people to look at; `metrics.jsonl` is the record, these can be lost."""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.observe.queued_tracker import QueuedTracker, Tracker

PROJECT = "hopescale"
"""Project at Weights & Biases, unless `WANDB_PROJECT` names another, and experiment at MLflow."""


MLFLOW_SERVER = "MLFLOW_TRACKING_URI"
"""Variable with the address of MLflow's server."""


WANDB_ID = "wandb_id"
MLFLOW_ID = "mlflow_id"
"""Files of the run folder with the ids that these services know it by."""

_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds and tries of its client, unless the user sets others: `QueuedTracker` tries again by itself."""


class TensorBoardTracker(Tracker):
    """TensorBoard event files, one folder for the whole of a run.

    Args:
        folder: `tb/` of the run; made if missing.
        resume_step: Step the run continues from; TensorBoard hides the folder's records of later steps. None hides
            everything before.

    Raises:
        HopescaleError: If the folder cannot be written, now or later.
    """

    def __init__(self, folder: Path, *, resume_step: int | None):
        self.folder = folder
        self._open(0 if resume_step is None else resume_step + 1)

    def _open(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(self.folder), purge_step=first)
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

    def log_values(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Write a histogram of the finite ones of each."""
        try:
            for name, each in values.items():
                if (finite := each[each.isfinite()]).numel():
                    self._writer.add_histogram(name, finite, step)
            self._writer.flush()
        except OSError as error:
            raise self._failure(error) from error

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, which are shown as they are and not as Markdown."""
        try:
            for name, text in texts.items():
                self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)
            self._writer.flush()
        except OSError as error:
            raise self._failure(error) from error

    def go_back(self, step: int) -> None:
        """Continue in a new file, which hides records of later steps in the others."""
        self.close()
        self._open(step + 1)

    def close(self) -> None:
        """Close the event file."""
        # `log` flushes, so only what it has already reported can fail here.
        with contextlib.suppress(OSError):
            self._writer.close()

    def _failure(self, error: OSError) -> HopescaleError:
        hint = "free some space, or leave tensorboard out of log.trackers and repeat the command"
        return HopescaleError(f"cannot write {self.folder}: {error.strerror}", hint)


class WandbTracker(Tracker):
    """A run at Weights & Biases, or in its files with `WANDB_MODE=offline`; its id is kept in the run folder.

    Args:
        folder: The run folder; if it knows an id, that run goes on.
        name: Name of the run.
        config: Values of the config, shown beside the metrics.
    """

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any]):
        import wandb

        kept = folder / WANDB_ID
        id = _kept(kept) or uuid.uuid4().hex[:12]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        how = {"id": id, "resume": "allow", "dir": str(folder), "config": dict(config)}
        self._run = wandb.init(project=project, name=name, settings=wandb.Settings(silent=True), **how)
        # Its own count of steps only grows; a run may go back.
        self._run.define_metric("*", step_metric="step")
        kept.write_text(f"{id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values of a step to its process in the background."""
        self._run.log({"step": step, **values})

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Hand texts to it, as values of the step."""
        self._run.log({"step": step, **texts})

    def close(self) -> None:
        """Wait until all is sent or written."""
        self._run.finish()


class MlflowTracker(Tracker):
    """A run at the server that `MLFLOW_TRACKING_URI` names; its id is kept. Arguments: those of `WandbTracker`."""

    def __init__(self, folder: Path, *, name: str, config: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for variable, value in _MLFLOW_PATIENCE.items():
            os.environ.setdefault(variable, value)
        self._client = MlflowClient(os.environ[MLFLOW_SERVER])
        id = _kept(folder / MLFLOW_ID)
        if id is None:
            experiment = self._client.get_experiment_by_name(PROJECT)
            number = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
            id = self._client.create_run(number, run_name=name).info.run_id
            (folder / MLFLOW_ID).write_text(f"{id}\n", encoding="utf-8")
        self._id = id
        # It was marked as ended if it goes on, and lacks some if it was begun while the server failed.
        self._client.update_run(id, status="RUNNING")
        known = self._client.get_run(id).data.params
        params = [Param(_plain(key), str(value)[:500]) for key, value in config.items() if _plain(key) not in known]
        for first in range(0, len(params), 100):
            self._client.log_batch(id, params=params[first : first + 100])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of a step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(_plain(name), value, now, step) for name, value in values.items()])

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Send texts as files, `<name>/step-<step>.txt`."""
        for name, text in texts.items():
            self._client.log_text(self._id, text, f"{_plain(name)}/step-{step:08d}.txt")

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._id)


def _plain(name: str) -> str:
    """Replace characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _kept(file: Path) -> str | None:
    """Return the id of a run's view, if it has one."""
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def require_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be opened, before there is a run folder to open them in.

    Args:
        names: Names of trackers, as of `open_trackers`.

    Raises:
        ConfigError: If a package is missing, or it is not said where MLflow's server is.
    """
    for tracker in names:
        if find_spec(tracker) is None:
            hint = f"pip install 'hopescale[{tracker}]', or leave it out"
            raise ConfigError(f"log.trackers has {tracker}, but the package {tracker} is not installed", hint)
    if "mlflow" in names and not os.environ.get(MLFLOW_SERVER):
        hint = f"set {MLFLOW_SERVER}, as in {MLFLOW_SERVER}=http://localhost:5000, or leave it out"
        raise ConfigError(f"log.trackers has mlflow, but {MLFLOW_SERVER} does not say where its server is", hint)


def open_trackers(
    names: Sequence[str], folder: Path, *, name: str, config: Mapping[str, Any], resume_step: int | None
) -> Trackers:
    """Open the trackers of a run, for which there is what `require_trackers` asks.

    Args:
        names: Names of trackers, each that of its package; all but TensorBoard's are extras of the same name.
        folder: The run folder.
        name: Name of the run.
        config: Values of the config by dotted key.
        resume_step: Step the run continues from; None begins anew.

    Raises:
        HopescaleError: If TensorBoard's files cannot be written.
    """
    if resume_step is None:
        for file in (WANDB_ID, MLFLOW_ID):
            (folder / file).unlink(missing_ok=True)
    about = {"name": name, "config": config}
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoardTracker(folder / "tb", resume_step=resume_step),
        "wandb": lambda: QueuedTracker("wandb", lambda: WandbTracker(folder, **about)),
        "mlflow": lambda: QueuedTracker("mlflow", lambda: MlflowTracker(folder, **about)),
    }
    return Trackers([makers[tracker]() for tracker in names])


class Trackers:
    """Several trackers as one.

    Args:
        trackers: Trackers; those of services are queued.

    Raises:
        HopescaleError: From every method, if the disk of the run folder cannot be written.
    """

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def log(self, step: int, values: Mapping[str, float], distributions: Mapping[str, Tensor]) -> None:
        """Show the values of a step, and distributions of many."""
        for tracker in self._trackers:
            tracker.log(step, values)
            tracker.log_values(step, distributions)

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Show texts of a step."""
        for tracker in self._trackers:
            tracker.log_texts(step, texts)

    def go_back(self, step: int) -> None:
        """Hide records of later steps."""
        for tracker in self._trackers:
            tracker.go_back(step)

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()
