"""Read documents from files, folders and remote addresses: plain text and JSON lines, compressed or not.

Knows nothing of tokens.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import PurePosixPath
from typing import NamedTuple

import fsspec

from hopescale.common.errors import DataError

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".7z", ".rar"}
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
    """

    inputs: tuple[str, ...]
    text_key: str = "text"
    patterns: tuple[str, ...] = ()
    separator: str | None = None

    def files(self) -> list[TextFile]:
        """List the input files: inputs in the order given, each folder sorted by path.

        Raises:
            DataError: If an input is missing or a folder has no matching file.
        """
        return [file for name in self.inputs for file in _find(name, self.patterns)]

    def documents(self, *, shuffle_seed: int | None = None) -> Iterator[Document]:
        """Read all documents, one file after the other; a seed shuffles the files, not the documents of a file.

        Raises:
            DataError: If a file cannot be read, is an archive or a table, is not UTF-8, or has a bad JSON line.
        """
        files = self.files()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        for file in files:
            _refuse_archive(file.path)
            _refuse_table(file)
            yield from self._read(file)

    def _read(self, file: TextFile) -> Iterator[Document]:
        with _reading(file.name), file.filesystem.open(file.path, "rb", compression="infer") as stream:
            first, second = stream.readline(), stream.readline()
            for begin, kind in _BINARY.items():
                if first.startswith(begin):
                    raise DataError(f"{file.name}: {kind}, not a text", hint="write its texts as JSON lines")
            if _holds_json_lines(first, second, _suffix(file.path), self.text_key):
                documents = _json_lines(chain(filter(None, (first, second)), stream), file.name, self.text_key)
            else:
                documents = _plain(first + second + stream.read(), file.name, self.separator)
            yield from (document for document in documents if not document.text.isspace() and document.text)


def _find(name: str, patterns: tuple[str, ...]) -> list[TextFile]:
    with _reading(name):
        filesystem, path = fsspec.url_to_fs(name)
        if filesystem.isfile(path):
            return [TextFile(filesystem, path, name)]
        if not filesystem.exists(path):
            raise DataError(f"input {name} does not exist", hint="check the path; relative paths start where you are")
        below = [(file, file[len(path) :].lstrip("/")) for file in sorted(_files_below(filesystem, path))]
    visible = [(file, rest) for file, rest in below if not any(p.startswith(".") for p in PurePosixPath(rest).parts)]
    matching = [(file, rest) for file, rest in visible if _matches(rest, patterns)]
    if not matching:
        looked = f"{len(visible)} files, none matches {' or '.join(patterns)}" if patterns else "no files"
        raise DataError(f"nothing to read in folder {name}: {looked}", hint="check the folder and --pattern")
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
    return not patterns or any(fnmatch(name, pattern) or fnmatch(path, pattern) for pattern in patterns)


def _refuse_archive(path: str) -> None:
    """Refuse a file of files: only its first member would be read."""
    if PurePosixPath(path.lower()).suffix in _ARCHIVES or path.lower().endswith((".tar.gz", ".tar.bz2", ".tar.xz")):
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


def _plain(content: bytes, name: str, separator: str | None) -> Iterator[Document]:
    text = _decode(content, name)
    if separator and "\n" in separator and "\r" not in separator and separator not in text:
        separator = separator.replace("\n", "\r\n")  # of a file whose lines end as Windows ends them
    for part in text.split(separator) if separator else [text]:
        yield Document(part, name)


def _json_lines(lines: Iterable[bytes], name: str, text_key: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        content = _decode(line, where)
        if not content.isspace():
            yield Document(_text_of(content, where, text_key), where)


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
        raise DataError(f"{where}: half a surrogate pair at character {error.start}", hint="repair the line") from None
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        raise DataError(message, hint="convert the file to UTF-8, or leave it out with --pattern") from None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(f"cannot read {name}: {error}", hint="install the package for this kind of address") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"cannot read {name}: {reason}", hint="check the address, the permissions, the file") from error
