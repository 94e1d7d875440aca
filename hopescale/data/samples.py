"""Rows of tokens for training: the interface of every kind of data set, and packing of a token stream into rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from hopescale.data.dataset import TokenStream

IGNORED = -100
"""Target of a position that the loss leaves out."""


class Rows(NamedTuple):
    """Samples side by side. All of shape `[B, T]`."""

    tokens: np.ndarray
    """Input ids, int64."""
    targets: np.ndarray
    """The id that follows each input, int64; `IGNORED` where none can be predicted."""
    document_ids: np.ndarray
    """Number of the document that each input belongs to, counted from 0 in every row, int32."""


class Samples(Protocol):
    """A numbered set of training sequences."""

    num_samples: int

    def read(self, samples: Sequence[int]) -> Rows:
        """Read the samples of these numbers, in this order."""

    def describe(self, sample: int) -> str:
        """Say in words where a sample lies."""


class PackedSamples:
    """A token stream cut into windows: sample `i` has inputs `[i T, (i + 1) T)` and targets one token later.

    No padding and nothing skipped but a tail shorter than a window. A window may hold several documents.
    """

    def __init__(self, stream: TokenStream, seq_len: int):
        """Cut `stream` into windows of `seq_len` tokens."""
        self.num_samples = max(0, stream.num_tokens - 1) // seq_len
        self._stream = stream
        self._seq_len = seq_len

    def read(self, samples: Sequence[int]) -> Rows:
        """Read windows.

        Raises:
            DataError: If a shard is damaged.
        """
        starts = [sample * self._seq_len for sample in samples]
        tokens = np.stack([self._stream.read(start, start + self._seq_len + 1) for start in starts]).astype(np.int64)
        document_ids = np.stack([self._stream.document_ids(start, start + self._seq_len) for start in starts])
        return Rows(tokens[:, :-1], tokens[:, 1:], document_ids)

    def describe(self, sample: int) -> str:
        """Name the shard and the range of tokens."""
        start = sample * self._seq_len
        return f"window {sample} of {self.num_samples}: {self._stream.describe(start, start + self._seq_len + 1)}"
