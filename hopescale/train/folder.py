"""The run folder: what it holds before the first step, and that one process at a time uses it."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO

from hopescale.common.errors import LaunchError
from hopescale.config.layout import Layout
from hopescale.config.load import Loaded, to_yaml
from hopescale.config.plan import make_plan
from hopescale.data.tokenizer import Tokenizer

_PACKAGES = ("hopescale", "torch", "megatron-core", "deepspeed", "numpy", "sentencepiece", "webdataset", "omegaconf")


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

    def describe(self, loaded: Loaded, layout: Layout, overrides: Sequence[str], groups: str) -> None:
        """Write what the run is: resolved config, overrides, origins, plan, parameter groups, environment.

        Raises:
            LaunchError: If the folder cannot be written.
        """
        files = {
            "config.yaml": to_yaml(loaded.config),
            "overrides.txt": "".join(f"{override}\n" for override in overrides),
            "origins.json": json.dumps(loaded.origins, indent=2) + "\n",
            "plan.json": json.dumps(make_plan(loaded.config, layout).to_dict(), indent=2) + "\n",
            "groups.txt": groups,
            "env.txt": _environment(),
        }
        try:
            for name, text in files.items():
                written = self.path / f".tmp-{name}"
                written.write_text(text, encoding="utf-8")
                written.replace(self.path / name)
        except OSError as error:
            raise self._failure(error) from error


def _environment() -> str:
    lines = [f"python {platform.python_version()} on {platform.platform()}", f"command {' '.join(sys.argv)}"]
    lines += [f"{package} {version(package)}" for package in _PACKAGES]
    return "\n".join([*lines, f"git {_git_revision()}"]) + "\n"


def _git_revision() -> str:
    """Return the revision of the source tree, marked if it differs; `none` where git does not track this package."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (" with local changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"
