"""Containers, recognised by their content: tables, JSON, tar archives, plain text, each as a stream of documents."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from hopescale.common.errors import DataError
from hopescale.data.compression import Readable, decompressed, with_head
from hopescale.data.records import BYTE_ORDER_MARK, Document, RecordRules, UndecodableError, decode
from hopescale.data.tables import arrow_rows, parquet_rows

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
_JSON_LINES = {".jsonl", ".ndjson"}
_TABLES = {".csv": "comma-separated", ".tsv": "tab-separated"}
_DELIMITERS = ",\t;|"
_ARCHIVE = "an archive of several files"
_BINARY = {
    b"PK\x03\x04": _ARCHIVE,
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE,
    b"Rar!\x1a\x07": _ARCHIVE,
    b"SQLite format 3": "an SQLite database",
    b"%PDF-": "a PDF",
    b"\x93NUMPY": "a NumPy array",
}
"""Files that are no text, by the bytes they begin with."""
_HEAD = 1 << 16
_TAR_MARK = slice(257, 262)
_TAR_BLOCK = 512
_LONGEST_CELL = 1 << 30


@dataclass(frozen=True)
class ContainerRules:
    """How files become documents.

    Args:
        records: Rules for the records of JSON and of tables.
        separator: Text at which plain files are cut into documents; null keeps a file whole.
        leaves_out: Function that tells of the path of a file within an archive whether it is left out.
    """

    records: RecordRules = field(default_factory=RecordRules)
    separator: str | None = None
    leaves_out: Callable[[str], bool] = lambda path: False

    def documents(self, packed: BinaryIO, name: str, *, of_archive: bool = False) -> Iterator[Document]:
        """Read the documents of a file, compressed or not.

        Args:
            packed: File at its beginning.
            name: Name in messages.
            of_archive: Whether it is part of an archive, in which nothing goes back.

        Raises:
            DataError: If it is a kind that is not read, is damaged, or holds no such records.
        """
        with decompressed(packed, name) as unpacked:
            head, stream = with_head(unpacked, _HEAD)
            if head.startswith(b"PAR1"):
                in_any_order = None if of_archive else packed
                yield from self._rows(parquet_rows(in_any_order, stream, name, self.records.keys), name)
            elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
                yield from self._rows(arrow_rows(stream, name, self.records.keys), name)
            elif head[_TAR_MARK] == b"ustar":
                yield from self._members(stream, name)
            else:
                _refuse(head, name)
                yield from self._texts(head, stream, name)

    def _rows(self, rows: Iterable[dict[str, Any]], name: str) -> Iterator[Document]:
        for number, row in enumerate(rows, start=1):
            where = f"{name}:{number}"
            yield from self.records.taken(where, partial(self.records.text_of, row, where, "row"))

    def _members(self, stream: BinaryIO, name: str) -> Iterator[Document]:
        """Read the files of a tar archive, in its order."""
        last = memoryview(b"")

        def read(size: int) -> bytes:
            nonlocal last
            data = stream.read(size)
            last = memoryview(bytes(last) + data)[-_TAR_BLOCK:]
            return data

        with tarfile.open(fileobj=io.BufferedReader(Readable(read)), mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and not self.leaves_out(str(path)):
                    yield from self.documents(archive.extractfile(member), f"{name}/{path}", of_archive=True)
        if bytes(last).strip(b"\0"):
            raise EOFError("the archive ends before its end mark")

    def _texts(self, head: bytes, stream: BinaryIO, name: str) -> Iterator[Document]:
        suffix = suffix_of(name)
        first, second = stream.readline(), stream.readline()
        if self._holds_json_lines(first, second, suffix):
            yield from self._json_lines(chain(filter(None, (first, second)), stream), name)
        elif delimiter := self._delimiter(first, suffix, name):
            yield from self._table(chain(filter(None, (first, second)), stream), delimiter, name)
        else:
            content = first + second + stream.read()
            records = self._json_records(content)
            if records is None:
                yield from self._plain(content, name)
                return
            for number, record in enumerate(records, start=1):
                where = f"{name}:{number}"
                yield from self.records.taken(where, partial(self.records.text_of, record, where, "record"))

    def _plain(self, content: bytes, name: str) -> Iterator[Document]:
        for whole in self.records.taken(name, lambda: decode(content, name)):
            separator = self.separator
            if separator and "\n" in separator and "\r" not in separator and separator not in whole.text:
                separator = separator.replace("\n", "\r\n")  # of a file whose lines end as Windows ends them
            for part in whole.text.split(separator) if separator else [whole.text]:
                if part and not part.isspace():
                    yield Document(part, name)

    def _holds_json_lines(self, first: bytes, second: bytes, suffix: str) -> bool:
        """Tell by the first lines, and the name where they leave it open, whether each line is a JSON object."""
        if suffix in _JSON_LINES:
            return True
        record = _parsed(first)
        if not isinstance(record, dict):
            return False
        return self.records.fits(record) or (suffix == ".json" and bool(second.strip()))

    def _json_lines(self, lines: Iterable[bytes], name: str) -> Iterator[Document]:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{name}:{number}"
            yield from self.records.taken(where, partial(self._text_of_line, line, where))

    def _text_of_line(self, line: bytes, where: str) -> str:
        content = decode(line, where)
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})", hint="each line must be one JSON object") from None
        return self.records.text_of(record, where)

    def _json_records(self, content: bytes) -> list[Any] | None:
        """Return the records of a file that is one JSON value: an array, an object around one, or the record itself."""
        if content.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] not in (b"[", b"{"):
            return None
        tree = _parsed(content.removeprefix(BYTE_ORDER_MARK))
        if self.records.fits(tree):
            return [tree]
        if isinstance(tree, dict):
            lists = [value for value in tree.values() if isinstance(value, list)]
            tree = lists[0] if len(lists) == 1 else None
        return tree if isinstance(tree, list) and tree and self.records.fits(tree[0]) else None

    def _delimiter(self, first: bytes, suffix: str, name: str) -> str | None:
        """Find the delimiter of a table's columns, by a first line that names the keys; None if it is no table.

        Raises:
            DataError: If the name says that it is a table, and the first line names other columns.
        """
        line = first.removeprefix(BYTE_ORDER_MARK).decode(errors="replace").rstrip("\r\n")
        for delimiter in _DELIMITERS if all(key in line for key in self.records.keys) else ():
            try:
                columns = next(csv.reader([line], delimiter=delimiter), [])
            except csv.Error:  # a line of text, however long
                continue
            if set(self.records.keys) <= set(columns) and (len(columns) > 1 or suffix in _TABLES):
                return delimiter
        if kind := _TABLES.get(suffix):
            message = f"{name}: a {kind} table without a column {' and '.join(map(repr, self.records.keys))}"
            hint = "name the column with --text-key, or several in a --template; to train on the table as it stands, "
            raise DataError(f"{message}; its first line is {line[:80]!r}", hint + "call the file .txt")
        return None

    def _table(self, lines: Iterable[bytes], delimiter: str, name: str) -> Iterator[Document]:
        """Read a table whose first line names its columns; a cell in quotes may hold line ends."""
        csv.field_size_limit(_LONGEST_CELL)
        decoded = (line.decode(errors="surrogateescape").removeprefix("\ufeff") for line in lines)
        reader = csv.reader(decoded, delimiter=delimiter, strict=True)
        columns = next(reader)
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{where}: not a row of the table ({error})", "quote cells as CSV does") from None
            if row is None:
                return
            if row and len(row) != len(columns):
                message = f"{where}: a row of {len(row)} cells in a table of {len(columns)} columns"
                raise DataError(message, "quote cells that hold the delimiter or a line end")
            if row:
                record = dict(zip(columns, row, strict=True))
                yield from self.records.taken(where, partial(self._text_of_row, record, where))

    def _text_of_row(self, record: dict[str, str], where: str) -> str:
        if any("\udc80" <= character <= "\udcff" for key in self.records.keys for character in record[key]):
            raise UndecodableError(f"{where}: not UTF-8 text", "convert to UTF-8, or leave it out: --skip-undecodable")
        return self.records.text_of(record, where, "row")


def suffix_of(path: str) -> str:
    """Return the last suffix of a name, in small letters and without that of its compression."""
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def _parsed(content: bytes) -> Any:
    """Parse JSON; return None for text that is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _refuse(head: bytes, name: str) -> None:
    """Refuse data that would be read as text and is none: a file of files, of which only the first would be read."""
    kind = next((kind for begin, kind in _BINARY.items() if head.startswith(begin)), None)
    if kind is None and {PurePosixPath(name.lower()).suffix, suffix_of(name)} & _ARCHIVES:
        kind = _ARCHIVE
    if kind == _ARCHIVE:
        raise DataError(f"{name}: {kind}, not a text", hint="unpack it and name the folder; tar archives are read")
    if kind:
        raise DataError(f"{name}: {kind}, not a text", hint="write its texts as JSON lines")
