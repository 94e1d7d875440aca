"""Put a finished folder in place in one move, or leave no trace of it.

Knows nothing of what the folder holds.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hopescale.common.disk import sync
from hopescale.common.errors import DataError, HopescaleError


@contextmanager
def staged_folder(out: Path, error_class: type[HopescaleError] = DataError) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends and vanishes when it fails.

    Readers of `out` see nothing or everything: files are on disk before the folder gets its name.

    Raises:
        HopescaleError: The `error_class`, if `out` holds something already, or the disk is full or not writable.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise error_class(f"output {out} already exists", hint="choose another folder, or delete the old one first")
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        partial.rename(out)
    except OSError as error:
        raise _write_error(out, error, error_class) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_error(out: Path, error: OSError, error_class: type[HopescaleError]) -> HopescaleError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = f"free some space or choose a folder on another disk; the unfinished {out.name} was removed"
    else:
        hint = f"check that {out.parent} is a folder you may write to"
    return error_class(f"cannot write {out}: {reason}", hint=hint)
