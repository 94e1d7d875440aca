"""Read a prepared data set as one long stream of tokens per split, any range at any time.

Reads are plain `pread` calls of the bytes needed: no scan, no state, and a truncated file is an error, not a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hopescale.common.errors import DataError
from hopescale.data.identity import of_index
from hopescale.data.shards import SPLITS, VERIFY_HINT, Index, ShardEntry
from hopescale.data.storage import INDEX_FILE, Storage, open_storage

_CACHED_BLOCKS = 1024


class _Block(NamedTuple):
    num_tokens: int
    num_documents: int
    tokens_offset: int
    documents_offset: int
    shard: int


class PreparedData:
    """A folder or an address written by `hopescale data prepare`, opened for reading."""

    def __init__(self, source: str | Path, *, cache: str | Path | None = None):
        """Read the index, load the tokenizer, and check that every shard is there in its full size.

        Args:
            source: Folder, or address of an object store.
            cache: Folder in which pieces of an address are kept; null keeps the last ones in memory.

        Raises:
            DataError: If anything is missing or of the wrong size, or the tokenizer is another one.
        """
        self.storage = open_storage(source, cache)
        self.index = Index.read(self.storage.small_files)
        self.tokenizer = self.index.check_tokenizer(self.storage.small_files)
        self.identity = of_index((self.storage.small_files / INDEX_FILE).read_bytes())
        self._check_sizes()
        self.splits = {name: TokenStream(self.storage, self.index, name) for name in SPLITS}

    def _check_sizes(self) -> None:
        wrong = []
        for entry in (entry for split in self.index.splits.values() for entry in split):
            try:
                size = self.storage.size(entry.file)
            except OSError as error:
                wrong.append(f"{entry.file} ({error.strerror or 'No such file'})")
                continue
            if size != entry.num_bytes:
                wrong.append(f"{entry.file} ({size:,} bytes, the index says {entry.num_bytes:,})")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            message = f"shards of {self.storage.name} are damaged: {', '.join(wrong[:3])}{more}"
            raise DataError(message, hint=VERIFY_HINT)


class TokenStream:
    """The tokens of one split, end to end. Safe to read from several threads."""

    def __init__(self, storage: Storage, index: Index, split: str):
        """Lay out the blocks of `split`; opens no shard."""
        self.split = split
        self._storage = storage
        self._dtype = np.dtype(index.dtype)
        self._vocab_size = index.vocab_size
        self._shards: list[ShardEntry] = index.splits[split]
        tables = [entry.blocks for entry in self._shards]
        columns = [[value for table in tables for value in getattr(table, field)] for field in _Block._fields[:-1]]
        self._shard_of = np.repeat(np.arange(len(tables)), [len(table.num_tokens) for table in tables])
        self._blocks = np.array([*columns, self._shard_of], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._blocks[0])])
        self._ends = lru_cache(_CACHED_BLOCKS)(self._document_ends)
        self.num_shards = len(self._shards)
        self.num_tokens = sum(entry.num_tokens for entry in self._shards)
        self.num_documents = sum(entry.num_documents for entry in self._shards)
        self.num_text_bytes = sum(entry.num_text_bytes for entry in self._shards)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text per token, end-of-text tokens counted."""
        return self.num_text_bytes / self.num_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens `start` to `stop` of the stream. Shape `[stop - start]`, the type of the shards.

        Raises:
            DataError: If a shard cannot be read or holds ids outside the vocabulary.
        """
        return np.concatenate([self._tokens(number, low, high) for number, low, high in self._pieces(start, stop)])

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Number the documents of a range of tokens, from 0 at its first. Shape `[stop - start]`, int32.

        A document begins with the end-of-text token before its text, as every text does that a model is asked.

        Raises:
            DataError: If a shard cannot be read or its document table does not fit its tokens.
        """
        parts, first = [], 0
        for number, low, high in self._pieces(start, stop):
            ids = np.searchsorted(self._ends(number), np.arange(low, high) + 1, side="right")
            parts.append(ids - ids[0] + first)
            first = parts[-1][-1]  # a block ends with the token that begins the first document of the next
        return np.concatenate(parts).astype(np.int32)

    def documents(self) -> Iterator[np.ndarray]:
        """Read one document after the other, each with its end-of-text token.

        Raises:
            DataError: Error that `read` or `document_ids` raises.
        """
        for number, size in enumerate(self._blocks[0]):
            yield from np.split(self._tokens(number, 0, int(size)), self._ends(number)[:-1])

    def describe(self, start: int, stop: int) -> str:
        """Say where a range of tokens lies: each shard touched, and the range counted from the shard's first token."""
        ranges: dict[int, tuple[int, int]] = {}
        for number, low, high in self._pieces(start, stop):
            shard = int(self._shard_of[number])
            before = int(self._starts[number] - self._starts[np.searchsorted(self._shard_of, shard)])
            begin = ranges[shard][0] if shard in ranges else before + low
            ranges[shard] = (begin, before + high)
        return ", ".join(f"{self._place(shard)} tokens {begin}..{end}" for shard, (begin, end) in ranges.items())

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut a range at block borders: block number, and the range counted from the block's first token."""
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} are not in a split of {self.num_tokens}")
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            yield number, start - base, end - base
            start, number = end, number + 1

    def _block(self, number: int) -> _Block:
        return _Block(*self._blocks[:, number].tolist())

    def _tokens(self, number: int, low: int, high: int) -> np.ndarray:
        block, size = self._block(number), self._dtype.itemsize
        data = self._bytes(block.shard, block.tokens_offset + low * size, (high - low) * size)
        tokens = np.frombuffer(data, self._dtype)
        if tokens.max() >= self._vocab_size:
            raise self._damaged(block.shard, f"token id {tokens.max()} in a vocabulary of {self._vocab_size}")
        return tokens

    def _document_ends(self, number: int) -> np.ndarray:
        block = self._block(number)
        table = np.frombuffer(self._bytes(block.shard, block.documents_offset, 16 * block.num_documents), "<i8")
        ends = np.cumsum(table[::2])
        if ends[-1] != block.num_tokens or table[::2].min() < 1:
            raise self._damaged(block.shard, f"its documents add up to {ends[-1]} tokens, not {block.num_tokens}")
        return ends

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        try:
            data = self._storage.read(self._shards[shard].file, offset, size)
        except OSError as error:
            raise self._damaged(shard, error.strerror or str(error)) from error
        if len(data) != size:
            raise self._damaged(shard, f"it ends at byte {offset + len(data)}, {offset + size} are needed")
        return data

    def _damaged(self, shard: int, reason: str) -> DataError:
        return DataError(f"shard {self._place(shard)} is damaged: {reason}", hint=VERIFY_HINT)

    def _place(self, shard: int) -> str:
        return f"{self._storage.name}/{self._shards[shard].file}"
