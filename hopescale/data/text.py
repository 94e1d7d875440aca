"""Documents from files, folders and remote addresses, in any container, compressed or not.

Knows nothing of tokens.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from hopescale.common.errors import DataError
from hopescale.data.containers import ContainerRules
from hopescale.data.inputs import TextFile, find_files, hub_rows, is_hidden, matches, reading
from hopescale.data.records import Document, RecordRules, UndecodableError

_LOOK_ON = 1 << 30  # bytes of further files that are read, after one that is no text, to name the others as well
_MOST_NAMED = 20


@dataclass(frozen=True)
class TextSource:
    """Where text lies and how it becomes documents.

    What a file holds decides, not its name. A row of a table (Parquet, Arrow, CSV), a JSON object of an array, and a
    line of JSON lines are one document each; a tar archive is the files in it; any other file is one document, or
    several when there is a separator. All may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). Documents of white space
    only are left out.

    Args:
        inputs: Files, folders (read recursively, without hidden files), fsspec addresses such as `s3://bucket/x`, or
            data sets of the hub (`hub:OWNER/NAME`).
        text_key: Key or column of the text.
        patterns: Shell patterns; a file in a folder is read when its name or its path below the folder matches any.
            Empty takes every file. Inputs named themselves are always read.
        separator: Text at which plain files are cut into documents; null keeps a file whole.
        exclude: Shell patterns of files of folders and archives that are left out, though a pattern takes them.
        template: Text in which `{key}` stands for the values of a record, in place of `text_key`.
        on_undecodable: Listener for the names of files and lines that are not UTF-8 and are left out; null refuses
            them.
        on_read: Listener for the bytes read of the input files since its last call; they add up to `num_bytes`.
    """

    inputs: tuple[str, ...]
    text_key: str = "text"
    patterns: tuple[str, ...] = ()
    separator: str | None = None
    exclude: tuple[str, ...] = ()
    template: str | None = None
    on_undecodable: Callable[[str], None] | None = None
    on_read: Callable[[int], None] = lambda num_bytes: None

    def files(self) -> list[TextFile]:
        """List the input files: inputs in the order given, each folder sorted by path.

        Raises:
            DataError: If an input is missing or a folder has no matching file.
        """
        return [file for name in self.inputs for file in find_files(name, self.patterns, self.exclude)]

    def documents(self, *, shuffle_seed: int | None = None) -> Iterator[Document]:
        """Read all documents, one file after the other; a seed shuffles the files, not the documents of a file.

        Raises:
            DataError: If a file cannot be read, is of a kind that is not read, is not UTF-8, or has a bad record.
            ConfigError: If the template is none.
        """
        files = self.files()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        for number, file in enumerate(files, 1):
            try:
                yield from self._read(file)
            except UndecodableError as error:
                raise self._with_others(error, files[number:]) from None

    @property
    def _rules(self) -> ContainerRules:
        records = RecordRules(self.text_key, self.template, self.on_undecodable)
        return ContainerRules(records, self.separator, lambda path: is_hidden(path) or matches(path, self.exclude))

    def _with_others(self, error: UndecodableError, files: Iterable[TextFile]) -> DataError:
        """Name the files that are not UTF-8 among those that follow the first such file, as far as one may look."""
        found, budget = [error.message], _LOOK_ON
        for file in files:
            budget -= file.size
            if budget < 0 or len(found) == _MOST_NAMED:
                found.append(f"(the files from {file.name} on were not looked at)")
                break
            try:
                for _ in self._read(file):
                    pass
            except DataError as other:
                found += [other.message] * isinstance(other, UndecodableError)
        return DataError("\n  ".join(found), error.hint)

    def _read(self, file: TextFile) -> Iterator[Document]:
        with reading(file.name):
            if file.filesystem is None:
                records = self._rules.records
                for number, row in enumerate(hub_rows(file.path, file.name), start=1):
                    where = f"{file.name}:{number}"
                    yield from records.taken(where, partial(records.text_of, row, where, "row"))
                return
            with file.filesystem.open(file.path, "rb") as stream:
                counted = _Counted(stream, self.on_read)
                yield from self._rules.documents(counted, file.name)
                self.on_read(max(0, file.size - counted.num_bytes))


class _Counted(io.RawIOBase):
    """A file that tells how many of its bytes have been read; those that are read again are told again.

    Args:
        stream: File.
        on_read: Listener for bytes.
    """

    def __init__(self, stream: BinaryIO, on_read: Callable[[int], None]):
        self.num_bytes = 0
        self._stream, self._on_read = stream, on_read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.num_bytes += len(data)
        self._on_read(len(data))
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
