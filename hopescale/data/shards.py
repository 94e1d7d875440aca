"""The format of a prepared data set: webdataset tar shards and the index that describes them.

A shard holds blocks, a block holds whole documents; `describe_shard` derives the index entry from the file alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hopescale.common.errors import DataError
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.storage import INDEX_FILE
from hopescale.data.tokenizer import Tokenizer

SPLITS = ("train", "validation")
VERIFY_HINT = "find every damaged file with `hopescale data verify`, then prepare the data set again"

_FORMAT = "hopescale-data"
_VERSION = 1
_TOKENS = ".tokens.npy"
_DOCUMENTS = ".documents.npy"


@dataclass(frozen=True)
class BlockTable:
    """Where each block of a shard lies. Lists of equal length, one entry a block."""

    num_tokens: list[int]
    num_documents: list[int]
    tokens_offset: list[int]
    """Byte of the shard at which the block's token ids begin."""
    documents_offset: list[int]
    """Byte of the shard at which the block's `[n, 2]` table of tokens and text bytes per document begins."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar file as the index describes it."""

    file: str
    sha256: str
    num_bytes: int
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    blocks: BlockTable


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer beside the index."""
    dtype: str
    """Type of the token ids, as numpy writes it: `<u2` or `<u4`."""
    seed: int
    """Seed of the document order and of the choice of held-out documents."""
    validation: float
    """Fraction of the documents that was to be held out."""
    splits: dict[str, list[ShardEntry]]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of a prepared data set.

        Raises:
            DataError: If the folder holds none, or one that this version cannot read.
        """
        path = folder / INDEX_FILE
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            hint = f"name a folder written by `hopescale data prepare`; {folder} holds no such data set"
            raise DataError(f"cannot read {path}: {error.strerror}", hint=hint) from error
        except ValueError as error:
            raise DataError(f"{path} is damaged: not valid JSON ({error})", hint="prepare the data set again") from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != _VERSION or content.get("format") != _FORMAT:
            message = f"{path} is not an index this version reads: it has version {version}, known is {_VERSION}"
            raise DataError(message, hint="prepare the data set again")
        try:
            return _index_of(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error!r}", hint="prepare the data set again") from None

    def write(self, folder: Path) -> None:
        """Write `index.json`. Equal data sets give equal files."""
        content = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        (folder / INDEX_FILE).write_text(json.dumps(content, separators=(",", ":")) + "\n")

    def check_tokenizer(self, folder: Path) -> Tokenizer:
        """Load the tokenizer beside the index.

        Raises:
            DataError: If it is missing or not the one that made the tokens.
        """
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != self.tokenizer:
            difference = f"its fingerprint begins {tokenizer.fingerprint[:12]}, the index says {self.tokenizer[:12]}"
            hint = "put the original file back, or prepare the data set again"
            raise DataError(f"{tokenizer.name} is not the tokenizer of this data set: {difference}", hint)
        return tokenizer


def _index_of(content: dict) -> Index:
    splits = {
        name: [ShardEntry(**{**entry, "blocks": BlockTable(**entry["blocks"])}) for entry in content["splits"][name]]
        for name in SPLITS
    }
    scalars = {name: content[name] for name in ("vocab_size", "tokenizer", "dtype", "seed", "validation")}
    if scalars["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"dtype {scalars['dtype']!r}")
    return Index(splits=splits, **scalars)


def token_dtype(vocab_size: int) -> np.dtype:
    """Give the smallest type that holds every id: two bytes below 65536, else four. Little-endian."""
    return np.dtype("<u2" if vocab_size < 65536 else "<u4")


class SplitWriter:
    """Writes the blocks of one split into numbered shards.

    Args:
        folder: Folder of the shards.
        split: First part of their names.
        shard_bytes: Token bytes that a shard of more than one block holds at most.
    """

    def __init__(self, folder: Path, split: str, *, shard_bytes: int):
        self.entries: list[ShardEntry] = []
        self._folder = folder
        self._split = split
        self._shard_bytes = shard_bytes
        self._num_blocks = 0
        self._size = 0
        self._buffer = io.BytesIO()  # a full disk then shows in `_flush`, not inside the tar library
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        """Append a block: ids of whole documents `[n]`, and tokens and text bytes of each document `[d, 2]`, int64."""
        if self._file is not None and self._size + tokens.nbytes > self._shard_bytes:
            self.close()
        if self._file is None:
            self._open()
        key = f"{self._num_blocks:09d}"
        self._tar.write({"__key__": key, "tokens.npy": _npy(tokens), "documents.npy": _npy(documents.astype("<i8"))})
        self._flush()
        self._num_blocks += 1
        self._size += tokens.nbytes

    def close(self) -> None:
        """End the current shard and describe it in `entries`."""
        if self._file is None:
            return
        self._tar.close()
        self._flush()
        self._file.close()
        self.entries.append(describe_shard(Path(self._file.name)))
        self._file = None

    def _open(self) -> None:
        from webdataset.writer import TarWriter  # brings torch, which nothing else here needs

        self._file = (self._folder / f"{self._split}-{len(self.entries):06d}.tar").open("wb")
        self._tar = TarWriter(self._buffer, encoder=False, mtime=0)
        self._size = 0

    def _flush(self) -> None:
        self._file.write(self._buffer.getbuffer())
        self._buffer.seek(0)
        self._buffer.truncate()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def describe_shard(path: Path) -> ShardEntry:
    """Derive a shard's index entry from the file itself.

    Raises:
        DataError: If the file cannot be read or its blocks contradict each other.
    """
    tokens: list[tuple[int, int]] = []  # (count, offset) of each block
    documents: list[tuple[int, int]] = []
    num_text_bytes = 0
    try:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            num_bytes = stream.seek(0, io.SEEK_END)
            for suffix, count, offset, table in _members(stream):
                (tokens if suffix == _TOKENS else documents).append((count, offset))
                num_text_bytes += int(table[:, 1].sum()) if table is not None else 0
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        raise DataError(f"shard {path} is damaged: {error}", hint=VERIFY_HINT) from None
    if len(tokens) != len(documents):
        raise DataError(f"shard {path} is damaged: {len(tokens)} blocks of tokens, {len(documents)} of documents")
    table = BlockTable(*([pair[i] for pair in part] for i in (0, 1) for part in (tokens, documents)))
    totals = sum(table.num_tokens), sum(table.num_documents), num_text_bytes
    return ShardEntry(path.name, sha256, num_bytes, *totals, table)


def _members(stream: BinaryIO) -> Iterator[tuple[str, int, int, np.ndarray | None]]:
    """Yield suffix, rows and payload offset of every array of a shard, and the array itself of a document table."""
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        members = tar.getmembers()
    for member in members:
        suffix = _DOCUMENTS if member.name.endswith(_DOCUMENTS) else _TOKENS
        stream.seek(member.offset_data)
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        offset = stream.tell()
        size = int(np.prod(shape)) * dtype.itemsize
        if offset + size != member.offset_data + member.size:
            raise ValueError(f"{member.name} has {member.size} bytes, its header says {size}")
        table = np.frombuffer(stream.read(size), dtype).reshape(shape) if suffix == _DOCUMENTS else None
        yield suffix, shape[0], offset, table
