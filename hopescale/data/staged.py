"""Copies of prepared data sets on a node's own disk: made before the ranks start, then read in place of the originals.

A copy is named after what the data set's index says, so that it is found whatever the original's path, and shared by
all runs that read the same data.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.errors import DataError
from hopescale.common.units import format_bytes
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.shards import VERIFY_HINT, Index, ShardEntry
from hopescale.data.storage import INDEX_FILE, Storage, filled_in, open_storage

_THREADS = 8
_PIECE = 4 * 2**20
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Staged:
    """Result of copying a data set."""

    folder: Path
    copied: int
    """Number of shards that were copied."""
    kept: int
    """Number of shards that were there and right."""
    num_bytes: int
    """Bytes that were copied."""


def folder_of_copies(root: str | Path) -> Path:
    """Return the folder of copies, with the environment variables in its name filled in: they may differ per job.

    Raises:
        DataError: If one is not set.
    """
    return filled_in(root, "data.staged")


def copy_of(source: str | Path, root: str | Path) -> Path:
    """Return the folder of a data set's copy below the folder of copies.

    Raises:
        DataError: If there is no complete copy, or no such data set.
    """
    folder = _name(open_storage(source), folder_of_copies(root))
    if not (folder / INDEX_FILE).is_file():
        hint = "copy it with `hopescale node stage` on every node first, or leave data.staged out"
        raise DataError(f"{root} holds no copy of {source} on {os.uname().nodename}", hint)
    return folder


def stage(
    source: str | Path, root: str | Path, on_copied: Callable[[int, int], None] = lambda num_bytes, total: None
) -> Staged:
    """Copy a data set, comparing every shard with the checksum in its index; shards that are there and right stay.

    One process of a machine works on a copy at a time, the others wait for it. The index comes last: with it the copy
    is complete.

    Args:
        source: Folder or address of the data set.
        root: Folder of copies, which is made if missing.
        on_copied: Listener for bytes that were copied, and for those of all that have to be; called by threads.

    Raises:
        DataError: If the data set is damaged, or the disk is full or not writable.
    """
    storage = open_storage(source)
    index, folder = Index.read(storage.small_files), _name(storage, folder_of_copies(root))
    try:
        with _alone(folder), ThreadPoolExecutor(_THREADS) as threads:
            entries = [entry for split in index.splits.values() for entry in split]
            right = list(threads.map(lambda entry: _is_right(folder / entry.file, entry), entries))
            missing = [entry for entry, is_right in zip(entries, right, strict=True) if not is_right]
            if missing or not (folder / INDEX_FILE).exists():
                _require_space(folder, sum(entry.num_bytes for entry in missing))
                total = sum(entry.num_bytes for entry in missing)
                list(threads.map(lambda entry: _copy(storage, folder, entry, lambda n: on_copied(n, total)), missing))
                load_tokenizer(storage.small_files).copy_to(folder)
                shutil.copyfile(storage.small_files / INDEX_FILE, folder / (INDEX_FILE + _PARTIAL))
                (folder / (INDEX_FILE + _PARTIAL)).replace(folder / INDEX_FILE)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise DataError(f"cannot copy {source} to {folder} on {os.uname().nodename}: {reason}") from error
    return Staged(folder, len(missing), len(entries) - len(missing), sum(entry.num_bytes for entry in missing))


def _name(storage: Storage, root: Path) -> Path:
    index = storage.small_files / INDEX_FILE
    try:
        return root / hashlib.sha256(index.read_bytes()).hexdigest()[:16]
    except OSError as error:
        hint = "name a folder written by `hopescale data prepare`"
        raise DataError(f"cannot read {index}: {error.strerror}", hint) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob(f"*{_PARTIAL}"):
            leftover.unlink()
        yield


def _is_right(path: Path, entry: ShardEntry) -> bool:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return size == entry.num_bytes and hashlib.file_digest(stream, "sha256").hexdigest() == entry.sha256
    except FileNotFoundError:
        return False


def _require_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        message = f"{folder} on {os.uname().nodename} lacks space: {format_bytes(wanted)} to copy"
        hint = f"remove copies that no run reads from {folder.parent}, or stage to another disk"
        raise DataError(f"{message}, {format_bytes(free)} free", hint)


def _copy(storage: Storage, folder: Path, entry: ShardEntry, on_copied: Callable[[int], None]) -> None:
    """Copy a shard and take its checksum on the way, in one reading."""
    partial, digest = folder / (entry.file + _PARTIAL), hashlib.sha256()
    with partial.open("wb") as written:
        while left := entry.num_bytes - written.tell():
            piece = storage.read(entry.file, written.tell(), min(_PIECE, left))
            if not piece:
                break
            digest.update(piece)
            written.write(piece)
            on_copied(len(piece))
    if digest.hexdigest() != entry.sha256:
        partial.unlink()
        difference = f"SHA-256 {digest.hexdigest()[:12]}, the index says {entry.sha256[:12]}"
        raise DataError(f"shard {storage.name}/{entry.file} is damaged: {difference}", VERIFY_HINT)
    partial.replace(folder / entry.file)
