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
from hopescale.common.errors import DataError


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends and vanishes when it fails.

    Readers of `out` see nothing or everything: files are on disk before the folder gets its name.

    Raises:
        DataError: If `out` holds something already, or the disk is full or not writable.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"output {out} already exists", hint="choose another --out, or delete the old folder first")
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        partial.rename(out)
    except OSError as error:
        raise _write_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_error(out: Path, error: OSError) -> DataError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = f"free some space or choose an --out on another disk; the unfinished {out.name} was removed"
    else:
        hint = f"check that {out.parent} is a folder you may write to"
    return DataError(f"cannot write {out}: {reason}", hint=hint)
