"""Tables of Parquet and Arrow, row by row, with the columns that are wanted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from hopescale.common.errors import DataError

_ROWS = 256
_IN_MEMORY = 64 << 20


def parquet_rows(
    packed: BinaryIO | None, unpacked: BinaryIO, name: str, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Read the rows of a Parquet file; one that was compressed as a whole goes through a temporary file.

    Args:
        packed: File before decompression, whose beginning may have been read; null if it cannot be read again.
        unpacked: Content of the file, from its beginning.
        name: Name in messages.
        columns: Names of the columns to read.

    Raises:
        DataError: If pyarrow is missing, a column is, or the file is damaged.
    """
    pyarrow = _pyarrow(name, "a Parquet table")
    from pyarrow import parquet

    try:
        with _with_any_order(packed, unpacked) as stream:
            file = parquet.ParquetFile(stream)
            _require(columns, file.schema_arrow.names, name)
            for batch in file.iter_batches(_ROWS, columns=list(columns), use_threads=False):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: a damaged Parquet table: {error}", "fetch it again") from error


def arrow_rows(stream: BinaryIO, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Read the rows of an Arrow file or stream, such as `datasets` saves.

    Raises:
        DataError: If pyarrow is missing, a column is, or the file is damaged.
    """
    pyarrow = _pyarrow(name, "an Arrow table")
    try:
        if stream.peek(6)[:6] == b"ARROW1":
            stream.read(8)  # a file is a stream between marks
        with pyarrow.ipc.open_stream(stream) as reader:
            _require(columns, reader.schema.names, name)
            for batch in reader:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from batch.slice(start, _ROWS).select(list(columns)).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: a damaged Arrow table: {error}", "fetch it again") from error


def _pyarrow(name: str, kind: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DataError(
            f"{name}: {kind}, which needs the package pyarrow", "pip install 'hopescale[parquet]'"
        ) from None
    return pyarrow


def _require(columns: Sequence[str], found: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in found]:
        message = f"{name}: no column {' and '.join(map(repr, missing))}; the table has {', '.join(map(repr, found))}"
        raise DataError(message, "name the column with --text-key, or several in a --template")


def _with_any_order(packed: BinaryIO | None, unpacked: BinaryIO) -> BinaryIO:
    """Return a file that can be read in any order: the packed one if it was not compressed, else a temporary one."""
    if packed is not None and packed.seekable():
        place = packed.tell()
        packed.seek(0)
        if packed.read(4) == b"PAR1":
            packed.seek(0)
            return packed
        packed.seek(place)
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
    shutil.copyfileobj(unpacked, file)
    file.seek(0)
    return file
