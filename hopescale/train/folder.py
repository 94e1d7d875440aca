"""The run folder, which one process at a time uses: its description, its outcome and the record of its metrics."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO

from torch import Tensor

from hopescale.common.disk import replace_text
from hopescale.common.errors import LaunchError
from hopescale.common.software import describe_software
from hopescale.config.fields import leaves
from hopescale.config.load import LoadedConfig
from hopescale.config.record import write_record
from hopescale.config.schema import RunConfig
from hopescale.data.tokenizer import Tokenizer
from hopescale.observe.metrics import MetricsLog, TextLog
from hopescale.observe.run_folder import require_own
from hopescale.observe.run_status import OUTCOME
from hopescale.observe.trackers import open_trackers
from hopescale.train.request import RunRequest


class RunFolder:
    """A run's folder, locked for as long as the object is open; a context manager.

    Args:
        path: The folder; it is made if missing.

    Raises:
        LaunchError: From every method that cannot write the folder, and on entry if another process is training in it,
            or it holds files of somebody else's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        with self._writing():
            require_own(self.path, "--run-dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "wait for it, stop it, or choose another --run-dir"
                raise LaunchError(f"run folder {self.path} is in use by another process", hint) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot write the run folder {self.path}: {error.strerror}"
            raise LaunchError(message, "choose another --run-dir") from error

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def keep_tokenizer(self, tokenizer: Tokenizer | None) -> list[Path]:
        """Copy the tokenizer into the folder, if there is one, and return the paths of its files."""
        with self._writing():
            return [] if tokenizer is None else tokenizer.copy_to(self.path)

    def describe(self, request: RunRequest, asked: LoadedConfig, groups: str) -> None:
        """Write the files that describe the run: config, overrides, origins, plan, parameter groups, environment.

        The outcome of the start before is removed.

        Args:
            request: Start whose config the plan is of.
            asked: Config as it was asked for, in which the micro batch may be `auto`, so that a later start may choose.
            groups: Table of parameter groups.
        """
        with self._writing():
            write_record(self.path, asked, request.layout, request.overrides, settled=request.loaded.config)
            replace_text(self.path / "groups.txt", groups)
            replace_text(self.path / "env.txt", describe_software())
            (self.path / OUTCOME).unlink(missing_ok=True)

    def note_outcome(self, outcome: str) -> None:
        """Write down how the run ended, until `describe` begins the next start."""
        with self._writing():
            replace_text(self.path / OUTCOME, f"{outcome}\n")


class Record:
    """Writes each step's values to `metrics.jsonl` and shows them in trackers; a context manager.

    Args:
        folder: Folder of the run.
        config: Config of the run, which names the trackers.
        resume_step: Step the run continues from, whose later records are dropped; None begins anew.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, *, resume_step: int | None):
        self._folder = folder.path
        self._open(resume_step)
        about = {"name": config.name, "config": leaves(config), "resume_step": resume_step}
        self._trackers = open_trackers(config.log.trackers, folder.path, **about)

    def _open(self, resume_step: int | None) -> None:
        self._metrics = MetricsLog(self._folder / "metrics.jsonl", resume_step=resume_step)
        self._texts = TextLog(self._folder / "samples.jsonl", resume_step=resume_step)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._trackers.close()

    def go_back(self, step: int) -> None:
        """Drop the records of later steps: the run goes on from this one."""
        self._metrics.close()
        self._open(step)
        self._trackers.go_back(step)

    def log(
        self,
        step: int,
        tokens_seen: int,
        values: Mapping[str, float],
        distributions: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write the values of a step; the file comes first, as a full disk is reported there in one message.

        `distributions` of many values are shown alone.
        """
        self._metrics.log(step, tokens_seen, values)
        self._trackers.log(step, values, distributions)

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts of a step by name, to `samples.jsonl` first."""
        self._texts.log(step, texts)
        self._trackers.log_texts(step, texts)
