"""Read documents from files, folders and remote addresses: plain text and JSON lines, compressed or not.

Knows nothing of tokens.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import PurePosixPath
from typing import NamedTuple

import fsspec

from hopescale.common.errors import DataError
from hopescale.data.compression import decompressed

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
_LOOK_ON = 1 << 30  # bytes of further files that are read, after one that is no text, to name the others as well
_MOST_NAMED = 20
_JSON_LINES = {".jsonl", ".ndjson"}
_TABLES = {".csv": "comma-separated", ".tsv": "tab-separated"}
_BINARY = {
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "an SQLite database",
    b"%PDF-": "a PDF",
}
"""Files that are no text, by the bytes they begin with."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and the place it came from, as `file` or `file:line`."""

    text: str
    where: str


class _Undecodable(DataError):
    """A file or a line that is no valid Unicode."""


class TextFile(NamedTuple):
    """One input file: its file system, its path there, and its name in messages."""

    filesystem: fsspec.AbstractFileSystem
    path: str
    name: str


@dataclass(frozen=True)
class TextSource:
    """Where text lies and how it is cut into documents.

    A file of JSON lines, whatever its name, is one document per line; any other file is one document, or several when
    there is a separator. Both may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Documents of white space only are left
    out.

    Args:
        inputs: Files, folders (read recursively, without hidden files) or fsspec addresses such as `s3://bucket/x`.
        text_key: Key of the text in a JSON line.
        patterns: Shell patterns; a file in a folder is read when its name or its path below the folder matches any.
            Empty takes every file. Inputs named themselves are always read.
        separator: Text at which plain files are cut into documents; null keeps a file whole.
        exclude: Shell patterns of files of folders that are left out, though a pattern takes them.
        on_undecodable: Listener for the names of files and lines that are not UTF-8 and are left out; null refuses
            them.
    """

    inputs: tuple[str, ...]
    text_key: str = "text"
    patterns: tuple[str, ...] = ()
    separator: str | None = None
    exclude: tuple[str, ...] = ()
    on_undecodable: Callable[[str], None] | None = None

    def files(self) -> list[TextFile]:
        """List the input files: inputs in the order given, each folder sorted by path.

        Raises:
            DataError: If an input is missing or a folder has no matching file.
        """
        return [file for name in self.inputs for file in _find(name, self.patterns, self.exclude)]

    def documents(self, *, shuffle_seed: int | None = None) -> Iterator[Document]:
        """Read all documents, one file after the other; a seed shuffles the files, not the documents of a file.

        Raises:
            DataError: If a file cannot be read, is an archive or a table, is not UTF-8, or has a bad JSON line.
        """
        files = self.files()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        for number, file in enumerate(files, 1):
            _refuse_archive(file.path)
            _refuse_table(file)
            try:
                yield from self._read(file)
            except _Undecodable as error:
                raise self._with_others(error, files[number:]) from None

    def _with_others(self, error: _Undecodable, files: Iterable[TextFile]) -> DataError:
        """Name the files that are not UTF-8 among those that follow the first such file, as far as one may look."""
        found, budget = [error.message], _LOOK_ON
        for file in files:
            budget -= file.filesystem.size(file.path) or 0
            if budget < 0 or len(found) == _MOST_NAMED:
                found.append(f"(the files from {file.name} on were not looked at)")
                break
            try:
                for _ in self._read(file):
                    pass
            except DataError as other:
                found += [other.message] * isinstance(other, _Undecodable)
        return DataError("\n  ".join(found), error.hint)

    def _taken(self, data: bytes, where: str, read: Callable[[bytes, str], str]) -> list[str]:
        """Return the text that `read` makes of bytes, alone; nothing if it is left out."""
        try:
            return [read(data, where)]
        except _Undecodable:
            if self.on_undecodable is None:
                raise
            self.on_undecodable(where)
            return []

    def _read(self, file: TextFile) -> Iterator[Document]:
        with (
            _reading(file.name),
            file.filesystem.open(file.path, "rb") as packed,
            decompressed(packed, file.name) as stream,
        ):
            first, second = stream.readline(), stream.readline()
            for begin, kind in _BINARY.items():
                if first.startswith(begin):
                    raise DataError(f"{file.name}: {kind}, not a text", hint="write its texts as JSON lines")
            if _holds_json_lines(first, second, _suffix(file.path), self.text_key):
                documents = self._json_lines(chain(filter(None, (first, second)), stream), file.name)
            else:
                documents = self._plain(first + second + stream.read(), file.name)
            yield from (document for document in documents if not document.text.isspace() and document.text)

    def _plain(self, content: bytes, name: str) -> Iterator[Document]:
        for text in self._taken(content, name, _decode):
            separator = self.separator
            if separator and "\n" in separator and "\r" not in separator and separator not in text:
                separator = separator.replace("\n", "\r\n")  # of a file whose lines end as Windows ends them
            for part in text.split(separator) if separator else [text]:
                yield Document(part, name)

    def _json_lines(self, lines: Iterable[bytes], name: str) -> Iterator[Document]:
        for number, line in enumerate(lines, start=1):
            where = f"{name}:{number}"
            for text in self._taken(line, where, self._text_of):
                yield Document(text, where)

    def _text_of(self, line: bytes, where: str) -> str:
        """Return the text of a JSON line; that of an empty line is empty."""
        content = _decode(line, where)
        return _text_of(content, where, self.text_key) if not content.isspace() else ""


def _find(name: str, patterns: tuple[str, ...], exclude: tuple[str, ...]) -> list[TextFile]:
    with _reading(name):
        filesystem, path = fsspec.url_to_fs(name)
        if filesystem.isfile(path):
            return [TextFile(filesystem, path, name)]
        if not filesystem.exists(path):
            raise DataError(f"input {name} does not exist", hint="check the path; relative paths start where you are")
        below = [(file, file[len(path) :].lstrip("/")) for file in sorted(_files_below(filesystem, path))]
    visible = [(file, rest) for file, rest in below if not any(p.startswith(".") for p in PurePosixPath(rest).parts)]
    chosen = [(file, rest) for file, rest in visible if not patterns or _matches(rest, patterns)]
    matching = [(file, rest) for file, rest in chosen if not _matches(rest, exclude)]
    if not matching:
        looked = f"{len(visible)} files, none matches {' or '.join(patterns)}" if patterns else "no files"
        looked = f"all {len(chosen)} files are left out by --exclude" if chosen else looked
        raise DataError(f"nothing to read in folder {name}: {looked}", hint="check the folder and the patterns")
    return [TextFile(filesystem, file, f"{name.rstrip('/')}/{rest}") for file, rest in matching]


def _files_below(
    filesystem: fsspec.AbstractFileSystem, folder: str, within: frozenset[str] = frozenset()
) -> Iterator[str]:
    """List the files of a folder and of folders that it links to, without going in circles."""
    within |= {os.path.realpath(folder)}
    for path, info in filesystem.find(folder, detail=True).items():
        if info.get("islink") and filesystem.isdir(path):
            if os.path.realpath(path) not in within:
                yield from _files_below(filesystem, path, within)
        elif info.get("type") == "other" and filesystem.exists(path):
            raise DataError(f"{path} is neither a file nor a folder", hint="leave it out of the folder")
        else:
            yield path


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    name = PurePosixPath(path).name
    return any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in patterns)


def _refuse_archive(path: str) -> None:
    """Refuse a file of files: only its first member would be read."""
    if {PurePosixPath(path.lower()).suffix, _suffix(path)} & _ARCHIVES:
        raise DataError(f"{path}: an archive of several files, not a text", hint="unpack it and name the folder")


def _refuse_table(file: TextFile) -> None:
    """Refuse a table that would be read as one text."""
    if kind := _TABLES.get(_suffix(file.path)):
        hint = "write its texts as JSON lines; to train on the table as it stands, call the file .txt"
        raise DataError(f"{file.name}: a {kind} table, whose lines are no documents", hint)


def _holds_json_lines(first: bytes, second: bytes, suffix: str, text_key: str) -> bool:
    """Tell by the first lines, and the name where they leave it open, whether each line of a file is a JSON object."""
    if suffix in _JSON_LINES:
        return True
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict):
        return False
    return isinstance(record.get(text_key), str) or (suffix == ".json" and bool(second.strip()))


def _suffix(path: str) -> str:
    name = PurePosixPath(path.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix


def _text_of(line: str, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})", hint="each line must be one JSON object") from None
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        found = f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        if isinstance(record, dict) and text_key in record:
            found = f"{json.dumps(record[text_key])[:40]} there"
        message = f"{where}: no text under the key {text_key!r}; the line has {found}"
        raise DataError(message, hint="name the key with --text-key")
    text = record[text_key]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{where}: half a surrogate pair at character {error.start}"
        raise _Undecodable(message, hint="repair the line, or leave out what is no text: --skip-undecodable") from None
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        hint = "convert to UTF-8, or leave out files with --exclude or --pattern, or all such with --skip-undecodable"
        raise _Undecodable(message, hint) from None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"cannot read {name}: {error}", hint="install the package for this kind of address") from error
    except Exception as error:
        own = isinstance(error, (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError))
        if not own and "://" not in name:
            raise  # the packages for addresses have exceptions of their own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read {name}: {reason}", hint="check the address, the permissions, the file") from error
