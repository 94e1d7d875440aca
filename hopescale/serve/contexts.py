"""Named contexts: texts that are read once, and from whose state any number of requests goes on."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.disk import staged_folder
from hopescale.common.errors import CheckpointError, DataError
from hopescale.infer.generate import Reading
from hopescale.infer.load import LoadedModel
from hopescale.infer.state import STATE, read_state, write_state

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class NoContext(DataError):
    """A context that is not there."""


@dataclass(frozen=True)
class NamedContext:
    """A text that was read: its name, and where the model stands after it."""

    name: str
    reading: Reading

    @property
    def tokens(self) -> int:
        """Tokens that were read."""
        return self.reading.state.position


class Contexts:
    """The contexts of a server, in memory, and in a folder as state files if there is one.

    Args:
        loaded: Model that reads them.
        folder: Folder of states, one folder each; None keeps them in memory alone.
        most: Most contexts in memory.
    """

    def __init__(self, loaded: LoadedModel, folder: Path | None, *, most: int = 64):
        self.loaded, self.folder, self.most = loaded, folder, most
        self._known: dict[str, NamedContext] = {}
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Refuse a name that cannot be a folder's, and one context too many.

        Raises:
            DataError: With what is allowed.
        """
        if not _NAME.fullmatch(name):
            rule = "up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
            raise DataError(f"{name!r} is no name of a context: {rule}")
        if name not in self._known and len(self._known) >= self.most:
            raise DataError(f"there are {self.most} contexts, as many as --max-contexts allows", "delete one")

    def put(self, name: str, reading: Reading) -> NamedContext:
        """Keep a context, in place of one of that name, and write its state file.

        Raises:
            DataError: If the name is refused.
            CheckpointError: If the file cannot be written.
        """
        self.check(name)
        context = NamedContext(name, reading)
        with self._lock:
            if self.folder is not None:
                new = self.folder / f".new-{name}"
                shutil.rmtree(new, ignore_errors=True)
                with staged_folder(new, CheckpointError) as folder:
                    write_state(reading, self.loaded, folder)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                new.rename(self.folder / name)
            self._known[name] = context
        return context

    def get(self, name: str) -> NamedContext:
        """Return a context, from its state file if it is not in memory.

        Raises:
            NoContext: If there is none of that name.
            CheckpointError: If its state file is damaged, or of another model.
        """
        with self._lock:
            if name not in self._known:
                path = None if self.folder is None or not _NAME.fullmatch(name) else self.folder / name
                if path is None or not (path / STATE).is_file():
                    raise NoContext(f"there is no context {name!r}", "read one: PUT /contexts/NAME")
                self._known[name] = NamedContext(name, read_state(path, self.loaded))
            return self._known[name]

    def delete(self, name: str) -> None:
        """Forget a context, and remove its state file.

        Raises:
            NoContext: If there is none of that name.
        """
        if name not in self.names():
            raise NoContext(f"there is no context {name!r}")
        with self._lock:
            self._known.pop(name, None)
            if self.folder is not None:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def names(self) -> list[str]:
        """Return the names of all contexts, sorted."""
        kept = [] if self.folder is None else [path.parent.name for path in self.folder.glob(f"*/{STATE}")]
        return sorted({*self._known, *filter(_NAME.fullmatch, kept)})
