"""Writes that survive a loss of power, and of which readers see all or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hopescale.common import signals
from hopescale.common.errors import DataError, HopescaleError


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file so that its readers see the old text or the new, whole."""
    written = path.parent / f".tmp-{path.name}"
    written.write_text(text, encoding="utf-8")
    written.replace(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is made in its folder, which is made too.

    Raises:
        BlockingIOError: If another process holds it.
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_locked(path: Path) -> bool:
    """Look whether a process of this machine, or of one that shares its locks, holds a lock file."""
    with suppress(OSError), path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def staged_folder(out: Path, error_class: type[HopescaleError] = DataError) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends and vanishes when it fails.

    Readers of `out` see nothing or everything: files are on disk before the folder gets its name. SIGTERM and SIGHUP
    are failures too.

    Raises:
        HopescaleError: The `error_class`, if `out` holds something already, or the disk is full or not writable.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise error_class(f"output {out} already exists", hint="choose another folder, or delete the old one first")
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    with signals.unwinding():
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in [*partial.iterdir(), partial]:
                sync(path)
            partial.rename(out)
        except OSError as error:
            hint = f"check that {out.parent} is a folder you may write to"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = f"free some space or choose a folder on another disk; the unfinished {out.name} was removed"
            raise error_class(f"cannot write {out}: {error.strerror or error}", hint=hint) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
