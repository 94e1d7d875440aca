"""Turn documents into a prepared data set: tokens, a held-out split, shuffled shards, an index.

Text is read once and never held whole; memory grows by 25 bytes a document, disk by twice the tokens for a while.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hopescale.common.disk import staged_folder
from hopescale.common.errors import DataError
from hopescale.common.groups import grouped
from hopescale.data.order import derive_key, mix64
from hopescale.data.records import Document
from hopescale.data.shards import SPLITS, Index, SplitWriter, token_dtype
from hopescale.data.tokenizer import Tokenizer
from hopescale.data.tokenizer_losses import RoundTrip

BLOCK_TOKENS = 65_536
"""Tokens of a block at most; a longer document is a block of its own."""

_BATCH_CHARACTERS = 4 << 20
_SPILL_FILE = "tokens.partial"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Spill:
    """Tokens of all documents in reading order on disk, and the sizes of each document."""

    path: Path
    dtype: np.dtype
    num_tokens: np.ndarray
    num_text_bytes: np.ndarray
    content_hash: np.ndarray


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation: float = 0.01,
    seed: int = 0,
    shard_bytes: int = 256 << 20,
    num_threads: int = 1,
    progress: Progress | None = None,
    on_written: Progress = lambda num_bytes, total: None,
    round_trip: RoundTrip | None = None,
) -> Index:
    """Write a data set of tokenised documents to the folder `out`; return its index.

    Every document is followed by the end-of-text token; there is no begin-of-text token. Documents are held out when
    a hash of their text and the seed is below `validation`, so copies of a text stay together; when none is, the one
    with the smallest hash. Each split is shuffled whole by the seed. The same documents, tokenizer and settings give
    the same bytes.

    Args:
        documents: Documents to tokenise.
        tokenizer: Tokenizer; it is copied to `out`.
        out: Folder to create; it appears when all is written.
        validation: Fraction of the documents to hold out, in `[0, 1)`.
        seed: Seed of the shuffle and of the held-out choice.
        shard_bytes: Token bytes of a shard, about.
        num_threads: Threads that tokenise.
        progress: Listener for the documents and the text bytes read so far.
        on_written: Listener for the bytes of tokens of a block that was written, and for those of all.
        round_trip: Counts of the tokenizer's losses, which receive every document.

    Raises:
        DataError: If there is no document, all would be held out, or `out` exists or cannot be written.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be in [0, 1), got {validation}")
    out = Path(out)
    with staged_folder(out) as folder:
        spill = _tokenise(documents, tokenizer, folder / _SPILL_FILE, seed, num_threads, progress, round_trip)
        held_out = _held_out(spill.content_hash, validation)
        writers = {split: SplitWriter(folder, split, shard_bytes=shard_bytes) for split in SPLITS}
        for writer, mask in zip(writers.values(), (~held_out, held_out), strict=True):
            _write_split(spill, _shuffled(np.flatnonzero(mask), seed), writer, on_written)
        spill.path.unlink()
        tokenizer.copy_to(folder)
        index = Index(
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            dtype=spill.dtype.str,
            seed=seed,
            validation=validation,
            splits={split: writer.entries for split, writer in writers.items()},
        )
        index.write(folder)
    return index


def _tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    path: Path,
    seed: int,
    num_threads: int,
    progress: Progress | None,
    round_trip: RoundTrip | None,
) -> _Spill:
    dtype = token_dtype(tokenizer.vocab_size)
    key = seed.to_bytes(16, "little", signed=True)
    num_tokens, num_text_bytes, content_hash = array("q"), array("q"), array("Q")
    total_bytes = 0
    with path.open("wb") as file:
        texts_read = (document.text for document in documents)
        for texts in grouped(texts_read, len, _BATCH_CHARACTERS):
            for text, ids in zip(texts, tokenizer.encode_batch(texts, num_threads=num_threads), strict=True):
                if round_trip:
                    round_trip.add(text, ids)
                content = text.encode()
                digest = hashlib.blake2b(content, key=key, digest_size=8).digest()
                file.write(np.array([*ids, tokenizer.eos_id], dtype).tobytes())
                num_tokens.append(len(ids) + 1)
                num_text_bytes.append(len(content))
                content_hash.append(int.from_bytes(digest, "little"))
                total_bytes += len(content)
            if progress:
                progress(len(num_tokens), total_bytes)
    if not num_tokens:
        raise DataError("no documents to prepare", hint="check the inputs; white space does not count")
    return _Spill(path, dtype, *(np.array(values) for values in (num_tokens, num_text_bytes, content_hash)))


def _held_out(content_hash: np.ndarray, fraction: float) -> np.ndarray:
    """Mark the documents of the validation split. Shape `[n]`, bool."""
    if fraction == 0:
        return np.zeros(len(content_hash), bool)
    mask = content_hash < np.uint64(int(fraction * 2**64))
    if not mask.any():
        mask = content_hash == content_hash.min()
    if mask.all():
        documents = f"{len(mask)} document{'s' if len(mask) > 1 else ''}"
        hint = "cut the text into documents with --separator, or hold out nothing with --validation 0"
        raise DataError(f"cannot hold out {fraction:g} of {documents}: nothing would be left to train on", hint)
    return mask


def _shuffled(ordinals: np.ndarray, seed: int) -> np.ndarray:
    key = derive_key("documents", seed)
    draws = np.fromiter((mix64(key ^ int(ordinal)) for ordinal in ordinals), np.uint64, len(ordinals))
    return ordinals[np.argsort(draws, kind="stable")]


def _write_split(spill: _Spill, order: np.ndarray, writer: SplitWriter, on_written: Progress) -> None:
    tokens = np.memmap(spill.path, spill.dtype, mode="r")
    ends = np.cumsum(spill.num_tokens)
    for block in grouped(map(int, order), lambda ordinal: int(spill.num_tokens[ordinal]), BLOCK_TOKENS):
        parts = [tokens[ends[ordinal] - spill.num_tokens[ordinal] : ends[ordinal]] for ordinal in block]
        table = np.stack([spill.num_tokens[block], spill.num_text_bytes[block]], axis=1)
        writer.write(np.concatenate(parts), table)
        on_written(sum(part.nbytes for part in parts), tokens.nbytes)
    writer.close()
