"""Files on object stores and other file systems that fsspec knows, read and written with retries."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec

_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each retry
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError)
_PIECE = 8 << 20
_TAGS = ("ETag", "etag")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")
_PACKAGES = {"s3": "pip install 'hopescale[s3]'", "gs": "pip install gcsfs", "abfs": "pip install adlfs"}

T = TypeVar("T")


def is_address(path: str | Path) -> bool:
    """Tell an address such as `s3://bucket/data` from a path of this machine."""
    return "://" in str(path)


def install_hint(address: str) -> str:
    """Say which package reads an address."""
    return _PACKAGES.get(address.partition("://")[0], "install the fsspec package for this kind of address")


class ObjectStore:
    """A folder at an address. Every method tries a failure of the network again, for about 15 seconds.

    Args:
        address: Address of the folder.

    Raises:
        OSError: From every method, if a file is missing or not allowed, or the store does not answer.
        ImportError: If the package for this kind of address is missing.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self._filesystem, self._root = fsspec.url_to_fs(self.address)
        self._root = self._root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _tried(self, do: Callable[[], T]) -> T:
        for wait in (*_WAITS, None):
            try:
                return do()
            except _FINAL:
                raise
            except Exception as error:  # every kind of store has exceptions of its own
                if wait is None:
                    reason = f"{type(error).__name__}: {error}"
                    raise OSError(None, f"no answer after {len(_WAITS)} retries ({reason})", self.address) from error
                time.sleep(wait)
        raise AssertionError

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return self._tried(lambda: self._filesystem.cat_file(self._path(name)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Read the bytes from `start` to `stop` of a file, fewer if it ends before."""
        return self._tried(lambda: self._filesystem.cat_file(self._path(name), start=start, end=stop))

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        return self._tried(lambda: self._size(name))

    def _size(self, name: str) -> int:
        self._filesystem.invalidate_cache()
        return self._filesystem.size(self._path(name))

    def version(self, name: str) -> str:
        """Return a word that changes when a file does: of its ETag, or of its size and time where a store has none.

        A web server (`https://`) that tells neither ETag nor time is asked for the size alone.
        """
        return self._tried(lambda: self._version(name))

    def _version(self, name: str) -> str:
        self._filesystem.invalidate_cache()
        info = self._filesystem.info(self._path(name))
        tag, changed = (next((info[key] for key in keys if info.get(key)), None) for keys in (_TAGS, _TIMES))
        return hashlib.sha256(f"{tag or (info.get('size'), str(changed))}".encode()).hexdigest()

    def names(self, folder: str = "") -> list[str]:
        """List the names directly below a folder, sorted; a missing folder is empty."""

        def do() -> list[str]:
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            own = self._path(folder)
            return sorted(path.rstrip("/").rpartition("/")[2] for path in found if path.rstrip("/") != own)

        return self._tried(do)

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file; readers see the old content or the new."""
        self._put(name, lambda path: self._filesystem.pipe_file(path, content))

    def upload(self, file: Path, name: str) -> None:
        """Copy a file of this machine to the store."""
        self._put(name, lambda path: self._filesystem.put_file(str(file), path))

    def _put(self, name: str, send: Callable[[str], None]) -> None:
        def do() -> None:
            self._filesystem.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            send(self._path(name))

        self._tried(do)

    def download(self, name: str, file: Path, on_piece: Callable[[bytes], None] = lambda piece: None) -> None:
        """Copy a file of the store to this machine, piece by piece.

        Args:
            name: File of the store.
            file: File to write.
            on_piece: Listener for each piece, in order.
        """
        size, start = self.size(name), 0
        with file.open("wb") as stream:
            while start < size:
                piece = self.read_range(name, start, min(size, start + _PIECE))
                if not piece:
                    raise OSError(None, f"ends at byte {start} of {size}", f"{self.address}/{name}")
                stream.write(piece)
                on_piece(piece)
                start += len(piece)

    def remove(self, folder: str) -> None:
        """Remove a folder and all that is in it."""
        self._tried(lambda: self._filesystem.rm(self._path(folder), recursive=True))
