"""Bytes that one micro batch leaves for the backward pass, and what the backward pass needs beside them.

Counted are the tensors that torch keeps, as the modules of `models` make them on one rank; [planning] derives the
table. Letters: `T` tokens, `B` sequences, `N` width, `F` hidden width of a level, `H` heads of the rank, `D` their
width, `C` tokens of a chunk, `V` rows of the vocabulary.

[planning]: docs/planning.md
"""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.layout import Layout
from hopescale.config.model_shape import (
    has_chunk_loop,
    head_dim,
    kv_heads,
    levels_of_block,
    padded_vocab_size,
    projection_chunk_size,
)
from hopescale.config.schema import ModelConfig, TrainConfig
from hopescale.cost.chunk_flops import banks
from hopescale.cost.mixer_activations import part_entries, trace_entries, whole_entries
from hopescale.ops.limits import REVERSE_PARTS

FP32 = 4


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one block and micro batch.

    Attributes:
        kept: From forward to backward, without the states.
        states: Of memories at the start of chunks, from forward to backward.
        again: What the block's backward computes again before it begins.
        workspace: What its backward needs on top of all that, at most.
    """

    kept: float
    states: float
    again: float
    workspace: float


@dataclass(frozen=True)
class BatchSizes:
    """What activations depend on, apart from the model.

    Attributes:
        tokens: `T * B`.
        batch: `B`.
        seq_len: `T`.
        itemsize: Bytes of an entry of the residual stream.
        tp: Ranks that share a layer.
        stream_share: Part of the tokens' residual stream that a rank holds between layers.
    """

    tokens: int
    batch: int
    seq_len: int
    itemsize: int
    tp: int
    stream_share: float

    @classmethod
    def of(cls, train: TrainConfig, layout: Layout) -> BatchSizes:
        """Return the sizes of a rank's micro batch."""
        share = 1 / layout.tp if layout.sequence_parallel else 1
        itemsize = 2 if train.precision == "bf16" else FP32
        batch = train.micro_batch_size
        return cls(train.seq_len * batch, batch, train.seq_len, itemsize, layout.tp, share)


def block_activations(model: ModelConfig, sizes: BatchSizes, recompute: str) -> BlockActivations:
    """Count one block; all cost the same."""
    stream = sizes.tokens * model.d_model * sizes.itemsize
    norm, inner = _norm(model, sizes), stream * sizes.stream_share
    states, mix_workspace = 0.0, 0.0
    if model.mixer == "attention":
        mixer, mix_workspace = _attention(model, sizes), _attention_workspace(model, sizes)
    else:
        mixer, states, mix_workspace = _self_modifying(model, sizes, recompute)
    mixer += inner  # the norm's result
    levels, level_workspace = _levels(model, sizes, norm)
    kept = norm + mixer + levels
    if recompute == "block":
        workspace = max(level_workspace, mix_workspace - levels)
        return BlockActivations(inner, 0, kept + states, workspace)
    if recompute == "memory":
        again = mixer - inner + states
        # When the mixer is computed again, the levels are done.
        return BlockActivations(norm + inner + levels, 0, 0, max(level_workspace, again + mix_workspace - levels))
    return BlockActivations(kept, states, 0, max(level_workspace, mix_workspace - levels))


def _norm(model: ModelConfig, sizes: BatchSizes) -> float:
    """Count a norm of the stream: its input in float32, and the input scaled."""
    return sizes.tokens * sizes.stream_share * (2 * model.d_model + 1) * FP32


def _levels(model: ModelConfig, sizes: BatchSizes, norm: float) -> tuple[float, float]:
    """Count what a block's levels keep, and what the backward of the widest needs."""
    stream = sizes.tokens * model.d_model * sizes.itemsize
    widths = [level.d_ff / sizes.tp * sizes.tokens * sizes.itemsize for level in levels_of_block(model, 0).values()]
    kept = 4 * sum(widths)  # gate, its activation, up, their product
    if model.cms.variant == "sequential":
        kept += len(widths) * (norm + stream)
    else:
        kept += norm + stream + len(widths) * stream
    return kept, 2 * max(widths) + stream


def _attention(model: ModelConfig, sizes: BatchSizes) -> float:
    """Count queries and keys after rotation, values within the in-projection's result, the answer, and it in order."""
    heads, groups = model.num_heads / sizes.tp, kv_heads(model) / sizes.tp
    rotated, projected = (heads + groups) * head_dim(model), (heads + 2 * groups) * head_dim(model)
    entries = rotated + projected + 2 * heads * head_dim(model)
    kept = sizes.tokens * (entries * sizes.itemsize + heads * FP32)
    if model.attention.qk_norm:
        copies = 1 if sizes.itemsize == FP32 else 2
        kept += sizes.tokens * (rotated * copies + heads + groups) * FP32
    return kept


def _attention_workspace(model: ModelConfig, sizes: BatchSizes) -> float:
    """Count the gradients of queries, keys, values, and of the in-projection's result."""
    width = (model.num_heads + 2 * kv_heads(model)) / sizes.tp * head_dim(model)
    return sizes.tokens * (2 * width * sizes.itemsize + model.d_model * sizes.itemsize)


def _self_modifying(model: ModelConfig, sizes: BatchSizes, recompute: str) -> tuple[float, float, float]:
    """Count what a mixer keeps, its memories' states, and what its backward needs."""
    mixer, heads, dim = model.self_modifying, model.num_heads / sizes.tp, head_dim(model)
    width = sizes.tokens * heads * dim
    # Streams: into the convolution, out of it in float32, and as unit vectors by head.
    conv = (sizes.tokens + (mixer.conv_width - 1) * sizes.batch) * heads * dim if mixer.conv_width else 0
    streams = 3 * (conv * sizes.itemsize + 2 * width * FP32 + sizes.tokens * heads * FP32)
    static = 2 + (mixer.momentum + mixer.retention) - len({"eta", "alpha"} & set(mixer.adaptive)) - 1
    streams += static * sizes.tokens * heads * FP32
    # The answers and their norm per head in float32, and what goes into the out-projection.
    kept = streams + width * (2 * FP32 + sizes.itemsize) + sizes.tokens * heads * FP32
    if mixer.gate:
        kept += width * 6 * sizes.itemsize
    per_head = sizes.batch * heads * FP32
    if not has_chunk_loop(mixer):
        inner, states = whole_entries(model, sizes.seq_len)
        return kept + inner * per_head, states * per_head, 6 * width * FP32
    all_banks, part = banks(model), projection_chunk_size(model)
    parts = -(-sizes.seq_len // part)
    states = parts * sum(bank.size for bank in all_banks) * (1 + mixer.momentum) * per_head
    # Of two parts at a time: what a part hands on, and the gradients of what was carried into it.
    handed_on = 2 * sum(bank.size for bank in all_banks) * (3 + 2 * mixer.momentum) * per_head
    open_part = part_entries(model, min(part, sizes.seq_len)) * per_head
    if recompute == "none":
        inner = sum(part_entries(model, min(part, sizes.seq_len - i * part)) for i in (0, parts - 1))
        inner = inner / 2 * parts if parts > 1 else inner / 2
        return kept + inner * per_head, states, 4 * width * FP32 + handed_on
    # Gradients of streams and answers, and one part's tensors.
    workspace = 5 * width * FP32 + handed_on + 1.3 * open_part
    if recompute != "reverse":
        return kept, states, workspace
    trace, found = (entries * per_head for entries in trace_entries(model, part))
    rows = -(-parts // REVERSE_PARTS)
    # States that are found again: of a row the last, and one for each half, quarter, ... before it.
    again = (min(parts, REVERSE_PARTS) - 1).bit_length() * found
    return kept, rows * states / parts + (parts - rows) * trace, workspace + again


def logits_bytes(model: ModelConfig, sizes: BatchSizes) -> float:
    """Count the logits when the loss goes back: their log-softmax, its gradient, and theirs, in float32."""
    copies = 3 if sizes.tp == 1 else 2
    return copies * sizes.tokens * padded_vocab_size(model) / sizes.tp * FP32


def head_bytes(model: ModelConfig, sizes: BatchSizes) -> float:
    """Count the final norm, and what goes into the head."""
    return _norm(model, sizes) + sizes.tokens * model.d_model * sizes.itemsize
