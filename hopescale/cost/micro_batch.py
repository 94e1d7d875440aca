"""A rank's micro batch, and what a part of the model keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.layout import Layout
from hopescale.config.schema import TrainConfig
from hopescale.cost.parameter import itemsize


@dataclass(frozen=True)
class MicroBatch:
    """A rank's micro batch: what activations depend on, apart from the model."""

    tokens: int
    batch: int
    seq_len: int
    itemsize: int
    """Bytes of an entry of the residual stream."""
    tp: int
    stream_share: float
    """Part of the tokens' residual stream that a rank holds between layers."""

    @classmethod
    def of(cls, train: TrainConfig, layout: Layout) -> MicroBatch:
        """Return the micro batch of each rank of a layout."""
        share = 1 / layout.tp if layout.sequence_parallel else 1
        batch, size = train.micro_batch_size, itemsize(train.precision)
        return cls(train.seq_len * batch, batch, train.seq_len, size, layout.tp, share)


@dataclass(frozen=True)
class Activations:
    """Bytes of one mixer or block, and micro batch.

    Attributes:
        kept: Bytes from forward to backward, without the states.
        states: Bytes of memories at the start of chunks, from forward to backward.
        workspace: Bytes that the backward needs on top of these, at most.
    """

    kept: float
    states: float
    workspace: float
