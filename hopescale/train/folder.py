"""The run folder: what it holds before the first step, and that one process at a time uses it."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hopescale.common.disk import replace_text
from hopescale.common.errors import LaunchError
from hopescale.common.software import describe_software
from hopescale.config.layout import Layout
from hopescale.config.load import LoadedConfig
from hopescale.config.record import write_record
from hopescale.data.tokenizer import Tokenizer


class RunFolder:
    """A run's folder, locked for as long as the object is open; a context manager.

    Args:
        path: The folder; made if missing.

    Raises:
        LaunchError: If it cannot be made or another process is training in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait for it, stop it, or choose another --run-dir"
            raise LaunchError(f"run folder {self.path} is in use by another process", hint) from error
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _failure(self, error: OSError) -> LaunchError:
        return LaunchError(f"cannot write the run folder {self.path}: {error.strerror}", "choose another --run-dir")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The record of the run."""
        return self.path / "metrics.jsonl"

    def keep_tokenizer(self, tokenizer: Tokenizer | None) -> Path | None:
        """Copy the tokenizer into the folder, if there is one, and return its path.

        Raises:
            LaunchError: If the folder cannot be written.
        """
        if tokenizer is None:
            return None
        try:
            return tokenizer.copy_to(self.path)
        except OSError as error:
            raise self._failure(error) from error

    def describe(self, loaded: LoadedConfig, layout: Layout, overrides: Sequence[str], groups: str) -> None:
        """Write what the run is: resolved config, overrides, origins, plan, parameter groups, environment.

        How the start before ended is forgotten.

        Raises:
            LaunchError: If the folder cannot be written.
        """
        try:
            write_record(self.path, loaded, layout, overrides)
            replace_text(self.path / "groups.txt", groups)
            replace_text(self.path / "env.txt", describe_software())
            (self.path / "outcome").unlink(missing_ok=True)
        except OSError as error:
            raise self._failure(error) from error

    def note_outcome(self, outcome: str) -> None:
        """Keep how the run ended, until `describe` begins the next start.

        Raises:
            LaunchError: If the folder cannot be written.
        """
        try:
            replace_text(self.path / "outcome", f"{outcome}\n")
        except OSError as error:
            raise self._failure(error) from error
