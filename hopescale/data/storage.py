"""Where a prepared data set lies: a folder of this machine, or one of an object store, whose pieces are kept."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from hopescale.common.disk import write_synced
from hopescale.common.errors import DataError
from hopescale.common.object_store import ObjectStore, install_hint, is_address
from hopescale.data.identity import INDEX_FILE
from hopescale.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE

logger = logging.getLogger(__name__)

PIECE = 1 << 20
"""Bytes that are read of an object store at a time."""

_OPEN_FILES = 64
_KEPT_PIECES = 64  # in memory; 64 MiB


class Storage(Protocol):
    """The files of a prepared data set. Every method raises OSError for a file that cannot be read.

    Attributes:
        name: Name in messages.
        small_files: Folder of this machine with the index and the tokenizer.
    """

    name: str
    small_files: Path

    def size(self, file: str) -> int:
        """Return the bytes of a shard."""

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Read a range of a shard, fewer bytes if it ends before. Safe to call from several threads."""

    def local_copy(self, file: str) -> Iterator[Path]:
        """Give a shard as a file of this machine, as a context."""


def open_storage(source: str | Path, cache: str | Path | None = None) -> Storage:
    """Open the place of a data set by its path in a config, in which `~` is the user's home.

    Args:
        source: Folder or address.
        cache: Folder in which pieces of an address are kept; null keeps the last ones in memory.

    Raises:
        DataError: If there is no data set at an address, or it cannot be reached.
    """
    return RemoteStorage(str(source), cache) if is_address(source) else LocalStorage(Path(source).expanduser())


class LocalStorage:
    """A folder of this machine.

    Args:
        folder: Folder.
    """

    def __init__(self, folder: Path):
        self.name = str(folder)
        self.small_files = folder
        self._open = lru_cache(_OPEN_FILES)(lambda file: (folder / file).open("rb", buffering=0))

    def size(self, file: str) -> int:
        """Return the bytes of a shard."""
        return (self.small_files / file).stat().st_size

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Read a range of a shard."""
        return os.pread(self._open(file).fileno(), size, offset)

    @contextmanager
    def local_copy(self, file: str) -> Iterator[Path]:
        """Give the shard itself."""
        yield self.small_files / file


class RemoteStorage:
    """A folder of an object store.

    Index and tokenizer are read once, when it is opened. Shards are read in pieces of 1 MiB. A piece in the folder
    `cache` is named after the index's content and the version of its shard (`ObjectStore.version`), so that it belongs
    to other data only where a web server tells of a shard its size alone; processes may share the folder.

    Args:
        address: Address of the data set.
        cache: Folder for pieces, which is made; null keeps the last 64 in memory.

    Raises:
        DataError: If there is no data set, or it cannot be reached, or the cache cannot be written.
    """

    def __init__(self, address: str, cache: str | Path | None):
        self.name = address.rstrip("/")
        try:
            self._store = ObjectStore(address)
            index = self._store.read(INDEX_FILE)
            self._folder = tempfile.TemporaryDirectory(prefix="hopescale-")
            self.small_files = Path(self._folder.name)
            (self.small_files / INDEX_FILE).write_bytes(index)
            for file in (SENTENCEPIECE_FILE, JSON_FILE, SETTINGS_FILE):
                if file in self._files:
                    (self.small_files / file).write_bytes(self._store.read(file))
            self._cache = None
            if cache is not None:
                digest = hashlib.sha256(index).hexdigest()[:16]
                self._cache = filled_in(cache, "data.cache") / digest
                self._cache.mkdir(parents=True, exist_ok=True)
        except ImportError as error:
            raise DataError(f"cannot read {self.name}: {error}", install_hint(self.name)) from error
        except FileNotFoundError:
            hint = "name a folder written by `hopescale data prepare`"
            raise DataError(f"{self.name} holds no data set: there is no {INDEX_FILE}", hint) from None
        except (OSError, ValueError) as error:
            message = f"cannot read {self.name}: {getattr(error, 'strerror', None) or error}"
            raise DataError(message, "check the address, and your right to read it") from error
        self._piece = lru_cache(_KEPT_PIECES)(self._read_piece)
        self._size = lru_cache(None)(self._store.size)
        self._version = lru_cache(None)(lambda file: self._store.version(file)[:12])

    @cached_property
    def _files(self) -> frozenset[str]:
        return frozenset(self._store.names())

    def size(self, file: str) -> int:
        """Return the bytes of a shard."""
        return self._size(file)

    def read(self, file: str, offset: int, size: int) -> bytes:
        """Read a range of a shard, by the pieces that it touches."""
        end = min(offset + size, self._size(file))
        if end <= offset:
            return b""
        first, last = offset // PIECE, (end - 1) // PIECE
        data = b"".join(self._piece(file, number) for number in range(first, last + 1))
        return data[offset - first * PIECE : end - first * PIECE]

    def _read_piece(self, file: str, number: int) -> bytes:
        """Read a piece from the cache, else from the store; one that is not whole is of no use in either place."""
        wanted = min(PIECE, self._size(file) - number * PIECE)
        kept = self._cache and self._cache / f"{file}.{number}.{self._version(file)}"
        if kept and kept.exists() and len(data := kept.read_bytes()) == wanted:
            return data
        if kept and (old := [path for path in kept.parent.glob(f"{file}.{number}.*") if path.suffix != ".partial"]):
            logger.warning("%s/%s has changed since it was kept in %s: it is read again", self.name, file, kept.parent)
            for path in old:
                path.unlink(missing_ok=True)
        if kept and (unknown := kept.with_name(f"{file}.{number}")).exists():  # it names no version, and may be of any
            unknown.unlink(missing_ok=True)
        data = self._store.read_range(file, number * PIECE, number * PIECE + wanted)
        if len(data) != wanted:
            raise OSError(f"the store gave {len(data)} bytes of {file} where {wanted} were asked for")
        if kept:
            written = kept.with_name(f"{kept.name}.{os.getpid()}.{id(data)}.partial")
            try:
                write_synced(written, data)
                written.replace(kept)
            except OSError as error:
                written.unlink(missing_ok=True)
                logger.warning("cannot keep %s, reading on without: %s", kept, error.strerror or error)
        return data

    @contextmanager
    def local_copy(self, file: str) -> Iterator[Path]:
        """Give a temporary copy of the shard."""
        path = self.small_files / file
        self._store.download(file, path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def filled_in(folder: str | Path, key: str) -> Path:
    """Return a folder of the config `key` with the environment variables in its name filled in.

    Raises:
        DataError: If one is not set.
    """
    path = os.path.expandvars(folder)
    if missing := re.search(r"\$(\w+|\{\w+\})", path):
        name = missing[1].strip("{}")
        raise DataError(f"{key} is {folder}, but the variable {name} is not set here", f"set {name}, or name a folder")
    return Path(path).expanduser()


def require_free(address: str) -> None:
    """Refuse an address at which something is, or that cannot be asked, before anything is made for it.

    Raises:
        DataError: With the reason.
    """
    with _writing(address):
        if ObjectStore(address).names():
            raise DataError(f"output {address} already exists", "choose another address, or delete the old one first")


def publish(folder: Path, address: str) -> None:
    """Copy a prepared data set to an object store, the index last.

    Raises:
        DataError: If something is there already, or it cannot be written.
    """
    require_free(address)
    with _writing(address):
        store = ObjectStore(address)
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == INDEX_FILE, file.name)):
            store.upload(file, file.name)


@contextmanager
def _writing(address: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"cannot write {address}: {error}", install_hint(address)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot write {address}: {reason}", "check the address, and your right to write it") from error
