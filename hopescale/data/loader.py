"""Batches for the trainer: tensors by global sample index. The only file here that knows torch.

Holds no position: the same index gives the same sample whenever and on whichever rank it is asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schema import DataConfig
from hopescale.data.identity import fingerprint
from hopescale.data.order import Mixture, quotas
from hopescale.data.samples import Rows
from hopescale.data.sources import Source, open_sources
from hopescale.data.tokenizer import Tokenizer
from hopescale.ops.documents import beginnings


class Batch(NamedTuple):
    """Training sequences side by side."""

    tokens: Tensor
    """Input ids. Shape `[B, T]`, int64."""
    targets: Tensor
    """The id after each input; -100 where the loss must not look. Shape `[B, T]`, int64."""
    document_ids: Tensor
    """Document of each input, counted from 0 in every row. Shape `[B, T]`, int32. It stays on the host, which finds out
    where documents lie."""
    begun: Tensor | None = None
    """Tokens of the document of each piece's first input in earlier pieces. Shape `[B, pieces]`, int32, on the host;
    None where sequences are whole."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; from page-locked memory, while the host goes on."""
        tokens, targets = (part.to(device, non_blocking=True) for part in (self.tokens, self.targets))
        return self._replace(tokens=tokens, targets=targets)

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return self._replace(tokens=self.tokens.pin_memory(), targets=self.targets.pin_memory())

    def share(self, share: Share) -> Batch:
        """Return the tokens of one rank of several that share the sequences; the batch itself for one alone."""
        if share.ranks == 1:
            return self
        parts = (share.of(part) for part in (self.tokens, self.targets, self.document_ids))
        return Batch(*parts, share.begun(self.document_ids))

    def pieces(self, count: int, *, within_documents: bool) -> list[Batch]:
        """Cut sequences that are whole, or a rank's share of them, into that many pieces.

        Where the documents of whole sequences begin is not looked for unless the model mixes `within_documents`.
        """
        parts = [self.tokens, self.targets, self.document_ids]
        if within_documents:
            parts.append(Share(segments=count).begun(self.document_ids) if self.begun is None else self.begun)
        return [Batch(*piece) for piece in zip(*(part.chunk(count, dim=1) for part in parts), strict=True)]


class Share(NamedTuple):
    """Part of each sequence that a rank holds.

    A sequence is cut into `ranks * segments` pieces, which are dealt out in turn: a rank holds each `ranks`-th of them.
    """

    rank: int = 0
    ranks: int = 1
    segments: int = 1

    def of(self, part: Tensor) -> Tensor:
        """Return this rank's tokens of sequences `[B, T]`: `[B, T / ranks]`, piece after piece."""
        pieces = part.unflatten(1, (self.segments, self.ranks, -1))
        return pieces[:, :, self.rank].flatten(1).contiguous()

    def begun(self, document_ids: Tensor) -> Tensor:
        """Return `Batch.begun` of this rank's pieces of whole sequences with these documents `[B, T]`."""
        ids, pieces = document_ids.numpy(), self.segments * self.ranks
        places = np.arange(ids.shape[1], dtype=np.int32)
        before = places - np.maximum.accumulate(np.where(beginnings(ids), places, 0), axis=1)
        firsts = before[:, :: ids.shape[1] // pieces].astype(np.int32)
        return torch.from_numpy(np.ascontiguousarray(firsts[:, self.rank :: self.ranks]))


class Data:
    """The training mixture and the held-out sets, opened and checked."""

    def __init__(self, config: DataConfig, sources: Mapping[str, Source], *, seq_len: int):
        """Use `open_data`, which checks first."""
        self.tokenizer: Tokenizer | None = next((s.tokenizer for s in sources.values() if s.tokenizer), None)
        self._config = config
        self._seq_len = seq_len
        self._sources = sources
        self._num_samples = {name: source.train.num_samples for name, source in sources.items()}
        self._mixture = Mixture({name: source.weight for name, source in sources.items()}, seed=config.seed)

    @property
    def fingerprint(self) -> str:
        """Identity of the sequence of samples: the tokenizer, each source's content and weight, the seed, `seq_len`.

        Hexadecimal. Two runs with equal fingerprints read the same tokens at every index.
        """
        sources = {name: (source.weight, source.identity) for name, source in self._sources.items()}
        return fingerprint(self._config.seed, self._seq_len, sources)

    def other_order(self, saved: DataConfig) -> str | None:
        """Say how the sources stand in another order than in a saved config, where that moves samples.

        Sources of equal weight share the places of the mixture, of which the first ones may have one more.
        """
        before = {name: source.weight for name, source in saved.sources.items() if source is not None}
        if quotas(before) == self._mixture.quotas:
            return None
        return f"the order of data.sources is {', '.join(self._mixture.quotas)}, but {', '.join(before)}"

    def check_budget(self, num_sequences: int) -> None:
        """Refuse a run of so many sequences that would read a source more often than `data.max_epochs`.

        Raises:
            ConfigError: Naming every such source, the sequences it would give and those it has.
        """
        problems = []
        for name, wanted in self._mixture.counts(num_sequences).items():
            have = self._num_samples[name]
            if wanted > have * self._config.max_epochs:
                message = (
                    f"the run reads {wanted:,} sequences of it, {wanted / have:.3g} epochs, but it has {have:,} of "
                    f"{self._seq_len} tokens and data.max_epochs is {self._config.max_epochs}"
                )
                hint = f"set data.max_epochs={-(-wanted // have)}, train fewer steps, or prepare more text"
                problems.append(Problem(f"data.sources.{name}", message, hint=hint))
        if problems:
            raise ConfigError(problems)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Read the training samples at these global indices, one row each, in this order.

        Raises:
            DataError: If a shard is damaged.
        """
        positions = [self._mixture.locate(index, self._num_samples) for index in indices]
        rows: list[Rows | None] = [None] * len(positions)
        for name, source in self._sources.items():
            places = [place for place, position in enumerate(positions) if position.source == name]
            if places:
                read = source.train.read([positions[place].sample for place in places])
                for row, place in enumerate(places):
                    rows[place] = Rows(*(part[row] for part in read))
        return _to_batch(Rows(*(np.stack(parts) for parts in zip(*rows, strict=True))))

    def locate(self, index: int) -> str:
        """Describe in words the sample of a global index: source, epoch, window, shard and token range."""
        source, epoch, sample = self._mixture.locate(index, self._num_samples)
        return f"source {source}, epoch {epoch}, {self._sources[source].train.describe(sample)}"

    @property
    def validation_sets(self) -> list[str]:
        """Names of the sources that have held-out samples."""
        return [name for name, source in self._sources.items() if source.validation is not None]

    def validation(self, name: str, tokens: int, batch_size: int) -> Iterator[Batch]:
        """Read a held-out set, always the same samples from the start of the split.

        As many whole sequences are read as fit in `tokens`, at least one, at most the split, whatever the size of a
        batch. The last batch may have fewer.

        Raises:
            DataError: If a shard is damaged.
        """
        samples = self._sources[name].validation
        count = min(samples.num_samples, max(1, tokens // self._seq_len))
        for start in range(0, count, batch_size):
            yield _to_batch(samples.read(range(start, min(start + batch_size, count))))

    def bits_per_byte(self, name: str, loss: float) -> float | None:
        """Turn a loss on a held-out split, in nats per token, into bits per byte of its text; null for synthetic ones.

        End-of-text tokens count as tokens, and have no bytes.
        """
        ratio = self._sources[name].bytes_per_token
        return None if ratio is None else loss / math.log(2) / ratio


def open_data(config: DataConfig, *, seq_len: int, vocab_size: int) -> Data:
    """Open every source of a config and check that they fit the model and each other.

    Raises:
        ConfigError: If a setting is wrong. Carries all problems, those of files included.
        DataError: If files are missing or damaged and nothing else is wrong.
    """
    return Data(config, open_sources(config, seq_len=seq_len, vocab_size=vocab_size), seq_len=seq_len)


def prefetched(
    data: Data,
    index_batches: Iterable[Sequence[int]],
    depth: int,
    *,
    pinned: bool = False,
    share: Share | None = None,
) -> Iterator[Batch]:
    """Read batches of global indices ahead in a background thread, in the order given.

    A `depth` of batches is held ready; 0 reads each one when it is asked for, without a thread. If `pinned`, they lie
    in page-locked memory, from which a GPU takes them by itself. A rank that shares the sequences keeps its `share`.

    Raises:
        DataError: Failure of the thread, raised at the batch where it happened.
    """

    def batch_of(indices: Sequence[int]) -> Batch:
        batch = data.batch(indices).share(share or Share())
        return batch.pin_memory() if pinned else batch

    if depth == 0:
        yield from map(batch_of, index_batches)
        return
    plan = iter(index_batches)

    def read() -> Batch | None:
        indices = next(plan, None)
        return None if indices is None else batch_of(indices)

    reader = ThreadPoolExecutor(1, "data-prefetch")
    ahead = deque(reader.submit(read) for _ in range(depth + 1))
    try:
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(reader.submit(read))
            yield batch
    finally:
        reader.shutdown(cancel_futures=True)


def _to_batch(rows: Rows) -> Batch:
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in rows))
