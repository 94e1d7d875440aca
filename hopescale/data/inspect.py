"""Look into a prepared data set: sample texts, and a check of every byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from hopescale.common.errors import DataError
from hopescale.data.dataset import PreparedData, TokenStream
from hopescale.data.samples import PackedSamples
from hopescale.data.shards import SPLITS, Index, ShardEntry, describe_shard
from hopescale.data.storage import Storage, open_storage


def first_documents(data: PreparedData, split: str, count: int) -> Iterator[tuple[int, str]]:
    """Decode the first documents of a split: tokens and text of each.

    Raises:
        DataError: If a shard is damaged.
    """
    for tokens in islice(data.splits[split].documents(), count):
        yield len(tokens), data.tokenizer.decode(tokens)


def window_texts(data: PreparedData, split: str, window: int, seq_len: int) -> list[str]:
    """Decode one packed window, cut where a document ends.

    Raises:
        DataError: If the split has no such window or a shard is damaged.
    """
    samples = PackedSamples(data.splits[split], seq_len)
    if not 0 <= window < samples.num_samples:
        raise DataError(f"no window {window} in the {split} split: it has {samples.num_samples} of {seq_len} tokens")
    rows = samples.read([window])
    tokens, ids = rows.tokens[0], rows.document_ids[0]
    return [data.tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(np.diff(ids)) + 1)]


def verify(
    source: str | Path,
    on_shard: Callable[[str], None] = lambda file: None,
    on_checked: Callable[[int], None] = lambda num_bytes: None,
) -> Index:
    """Recompute every checksum and read every block.

    Args:
        source: Folder or address of a prepared data set.
        on_shard: Listener for the name of each shard, before it is read.
        on_checked: Listener for the bytes of each shard, after it was read.

    Raises:
        DataError: If the index or the tokenizer is wrong, or naming every bad shard.
    """
    storage = open_storage(source)
    index = Index.read(storage.small_files)
    tokenizer = index.check_tokenizer(storage.small_files)
    faults = []
    for split in SPLITS:
        for entry in index.splits[split]:
            on_shard(entry.file)
            fault = _fault(storage, index, split, entry, tokenizer.eos_id)
            faults += [f"{entry.file}: {fault}"] if fault else []
            on_checked(entry.num_bytes)
    if faults:
        listed = "\n    ".join(faults)
        raise DataError(
            f"{len(faults)} of {sum(map(len, index.splits.values()))} shards of {source} are damaged\n    {listed}",
            hint="copy them from a good copy, or prepare the data set again; the same text gives the same files",
        )
    return index


def _fault(storage: Storage, index: Index, split: str, entry: ShardEntry, eos_id: int) -> str | None:
    """Say what is wrong with a shard, if anything."""
    try:
        with storage.local_copy(entry.file) as path:
            actual = describe_shard(path)
    except DataError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    if actual.sha256 != entry.sha256:
        return f"SHA-256 {actual.sha256[:12]}, the index says {entry.sha256[:12]}"
    if actual != entry:
        return "its checksum is right, but the index describes other blocks"
    alone = Index(**{**vars(index), "splits": {split: [entry]}})
    try:
        for document in TokenStream(storage, alone, split).documents():
            if document[-1] != eos_id:
                return "a document does not end with the end-of-text token"
    except DataError as error:
        return error.message
    return None
