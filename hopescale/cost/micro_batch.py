"""A rank's micro batch, and the activations that a part of the model keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.execution import kernel_products
from hopescale.config.layout import Layout
from hopescale.config.schema import TrainConfig
from hopescale.cost.parameter import itemsize


@dataclass(frozen=True)
class MicroBatch:
    """Tokens that a rank runs at a time; activations depend on them and on the model."""

    tokens: int
    batch: int
    seq_len: int
    """Tokens of a sequence, or of a piece of one."""
    itemsize: int
    """Bytes of an entry of the residual stream."""
    tp: int
    stream_share: float
    """Part of the tokens' residual stream that a rank holds between layers."""
    on_gpu: bool = False
    """Whether the device is a GPU, as `train.device` says, which a plan sets to its own."""
    fused: bool = False
    """Whether kernels do what lies between products there."""
    kernels: bool = False
    """Whether kernels run memories there that have widths they know."""
    kept_itemsize: int = 4
    """Bytes of an entry of the states that these kernels keep."""
    carried: bool = False
    """Whether tokens begin with a state that the backward pass goes on from, as those of a sequence in pieces do."""

    @classmethod
    def of(cls, train: TrainConfig, layout: Layout) -> MicroBatch:
        """Return the tokens that each rank of a layout runs at a time: a piece of each sequence of a micro batch."""
        share = 1 / layout.tp if layout.sequence_parallel else 1
        batch, size = train.micro_batch_size, itemsize(train.precision)
        tokens = train.seq_len // (layout.cp * train.segments)
        on_gpu = train.device == "cuda"
        fused = on_gpu and train.backend in ("auto", "triton")
        code = (on_gpu, fused, fused and not train.compile, 2 if kernel_products(train) == "bf16" else 4)
        carried = layout.cp * train.segments > 1
        return cls(tokens * batch, batch, tokens, size, layout.tp, share, *code, carried)


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
