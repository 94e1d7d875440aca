"""Named contexts: texts that are read once, and from whose state any number of requests goes on."""

from __future__ import annotations

import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hopescale.common.disk import staged_folder
from hopescale.common.errors import CheckpointError, DataError
from hopescale.infer.generate import Reading
from hopescale.infer.load import LoadedModel
from hopescale.infer.state import STATE, read_state, write_state

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OLD = ".old-"
"""What begins the name of a context's folder while another takes its place."""


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


@dataclass
class _Place:
    """The lock of one context, for as long as somebody holds it or waits for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


class Contexts:
    """The contexts of a server, in memory, and in a folder as state files if there is one.

    With a folder the context that was asked longest ago leaves memory when there are too many, and is read again when
    it is asked for. The files of one context are written and read by one thread at a time, those of others meanwhile.

    Args:
        loaded: Model that reads them.
        folder: Folder of states, one folder each; None keeps them in memory alone.
        most: Most contexts in memory; without a folder one more is refused.

    Raises:
        CheckpointError: If a context cannot be put back whose replacement was cut off.
    """

    def __init__(self, loaded: LoadedModel, folder: Path | None, *, most: int = 64):
        self.loaded, self.folder, self.most = loaded, folder, most
        self._known: OrderedDict[str, NamedContext] = OrderedDict()  # the one that was asked last comes last
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()  # of the two above; never held while files are written or read
        for old in folder.glob(f"{_OLD}*") if folder is not None else ():
            with _written(folder):
                _end_replacement(old, folder / old.name.removeprefix(_OLD))

    def check(self, name: str) -> None:
        """Refuse a name that cannot be a folder's, and one context too many.

        Raises:
            DataError: If the name is not allowed, or there are too many contexts.
        """
        if not _NAME.fullmatch(name):
            rule = "up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"
            raise DataError(f"{name!r} is no name of a context: {rule}")
        with self._lock:
            self._check_room(name)

    def _check_room(self, name: str) -> None:
        if self.folder is None and name not in self._known and len(self._known) >= self.most:
            hint = "delete one, or serve with --contexts FOLDER, which keeps more of them"
            raise DataError(f"there are {self.most} contexts, as many as --max-contexts allows", hint)

    def put(self, name: str, reading: Reading) -> NamedContext:
        """Keep a context, in place of one of that name, and write its state file.

        Raises:
            DataError: If the name is refused.
            CheckpointError: If the file cannot be written.
        """
        self.check(name)
        context = NamedContext(name, reading)
        with self._alone(name):
            if self.folder is not None:
                self._write(context, self.folder)
            self._keep(context)
        return context

    def get(self, name: str) -> NamedContext:
        """Return a context, from its state file if it is not in memory.

        Raises:
            NoContext: If there is none of that name.
            CheckpointError: If its state file is damaged, or of another model.
        """
        if (known := self._in_memory(name)) is not None:
            return known
        with self._alone(name):
            if (known := self._in_memory(name)) is not None:  # another thread has read it meanwhile
                return known
            path = None if self.folder is None or not _NAME.fullmatch(name) else self.folder / name
            if path is None or not (path / STATE).is_file():
                raise NoContext(f"there is no context {name!r}", "read one: PUT /contexts/NAME")
            context = NamedContext(name, read_state(path, self.loaded))
            self._keep(context)
            return context

    def delete(self, name: str) -> None:
        """Forget a context, and remove its state file.

        Raises:
            NoContext: If there is none of that name.
        """
        with self._alone(name):
            if name not in self.names():
                raise NoContext(f"there is no context {name!r}")
            with self._lock:
                self._known.pop(name, None)
            if self.folder is not None:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def names(self) -> list[str]:
        """Return the names of all contexts, sorted."""
        kept = [] if self.folder is None else [path.parent.name for path in self.folder.glob(f"*/{STATE}")]
        with self._lock:
            return sorted({*self._known, *filter(_NAME.fullmatch, kept)})

    def _write(self, context: NamedContext, root: Path) -> None:
        new = root / f".new-{context.name}"
        shutil.rmtree(new, ignore_errors=True)
        with staged_folder(new, CheckpointError) as folder:
            write_state(context.reading, self.loaded, folder)
        place, old = root / context.name, root / f"{_OLD}{context.name}"
        with _written(place):
            _end_replacement(old, place)
            if place.exists():
                place.rename(old)
            try:
                new.rename(place)
            finally:
                _end_replacement(old, place)

    def _in_memory(self, name: str) -> NamedContext | None:
        with self._lock:
            if name in self._known:
                self._known.move_to_end(name)
            return self._known.get(name)

    def _keep(self, context: NamedContext) -> None:
        """Put a context into memory; if there are too many, the one that was used longest ago leaves it."""
        with self._lock:
            self._check_room(context.name)
            self._known[context.name] = context
            self._known.move_to_end(context.name)
            while len(self._known) > self.most:
                self._known.popitem(last=False)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold the lock of one context."""
        with self._lock:
            place = self._places.setdefault(name, _Place())
            place.users += 1
        try:
            with place.lock:
                yield
        finally:
            with self._lock:
                place.users -= 1
                if not place.users:
                    del self._places[name]


def _end_replacement(old: Path, place: Path) -> None:
    """Remove the old folder of a context, or put it back if nothing has taken its place."""
    if not old.exists():
        return
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.rename(place)


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = f"check that {place.parent} is a folder you may write to"
        raise CheckpointError(f"cannot write {place}: {error.strerror or error}", hint) from error
