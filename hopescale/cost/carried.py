"""State that a model carries from one piece of a sequence to the next: bytes by mixer. Imports no torch."""

from __future__ import annotations

from hopescale.config.execution import effective_recompute
from hopescale.config.layout import Layout
from hopescale.config.model_shape import (
    bank_layers,
    head_dim,
    kv_heads,
    memory_banks,
    memory_parts,
    mixer_of_block,
    projection_chunk_size,
)
from hopescale.config.schema import (
    AttentionConfig,
    LinearAttentionConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
    SelfModifyingConfig,
)
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.config.titans import titans_attention
from hopescale.cost.kernels import forward_workspace, packed_size, runs_kernels
from hopescale.cost.linear_attention import linear_attention_state
from hopescale.cost.micro_batch import MicroBatch
from hopescale.cost.parameter import FP32, itemsize
from hopescale.cost.ttt import ttt_state

STREAMS = 3
"""Keys, values and queries, which a short convolution runs over."""


def carried_bytes(config: RunConfig, mixer: MixerConfig, position: int, tp: int = 1) -> int:
    """Return the bytes that a mixer hands on after so many tokens of a micro batch, at the end of a piece.

    Those of all `tp` tensor-parallel ranks, which divide the heads.
    """
    model, batch = config.model, config.train.micro_batch_size
    if isinstance(mixer, AttentionConfig):
        seen = min(position, mixer.window or position)
        return 2 * batch * kv_heads(model, mixer) * head_dim(model) * seen * itemsize(config.train.precision)
    if isinstance(mixer, LinearAttentionConfig):
        return FP32 * batch * sum(linear_attention_state(model, mixer).values())
    if isinstance(mixer, TttConfig):
        return FP32 * batch * sum(ttt_state(model, mixer).values())
    assert isinstance(mixer, SelfModifyingConfig)
    tail = STREAMS * head_dim(model) * ((mixer.conv_width or 1) - 1)
    total = FP32 * batch * model.num_heads * (tail + sum(_memories(model, part) for part in memory_parts(mixer)))
    prefixed = isinstance(mixer, TitansConfig) and mixer.composition != "mac"
    if prefixed:
        seen = position + mixer.persistent_tokens * (mixer.composition == "mal")
        total += carried_bytes(config, titans_attention(mixer), seen)
    return total + (_unfinished(config, mixer, tp) if _ends_in_chunks(config, mixer) else 0)


def _ends_in_chunks(config: RunConfig, mixer: SelfModifyingConfig) -> bool:
    """Tell whether pieces end within chunks: those of documents, and those that count persistent tokens, on ranks."""
    prefixed = isinstance(mixer, TitansConfig) and mixer.composition != "mac"
    return config.model.within_documents or (prefixed and config.parallel.cp > 1)


def chunks_rerun(config: RunConfig, layout: Layout, mixer: MixerConfig) -> float:
    """Return what pieces run again of the chunks in which the pieces before them end, as a part of all tokens.

    On average a chunk is cut in its middle; every document is taken to go on.
    """
    pieces = layout.cp * config.train.segments
    if not isinstance(mixer, SelfModifyingConfig) or pieces == 1 or not _ends_in_chunks(config, mixer):
        return 0.0
    return (pieces - 1) * projection_chunk_size(mixer) / 2 / config.train.seq_len


def _unfinished(config: RunConfig, mixer: SelfModifyingConfig, tp: int) -> int:
    """Count the bytes of the tokens that the next piece runs again, as a document's last chunk is not at its end."""
    model, batch = config.model, config.train.micro_batch_size
    if isinstance(mixer, TitansConfig) and mixer.composition == "mac":
        return tp * batch * model.d_model * (mixer.chunk_size - 1) * itemsize(config.train.precision)
    size = max(projection_chunk_size(mixer), mixer.far.chunk_size if mixer.far else 1)
    return FP32 * batch * model.num_heads * 2 * head_dim(model) * (size - 1)


def _memories(model: ModelConfig, mixer: SelfModifyingConfig) -> int:
    """Count the entries of a head's memories and their momenta."""
    entries = 0
    for names in memory_banks(mixer).values():
        entries += sum(width * out * count for width, out, count in bank_layers(model, mixer, names))
    return entries * (1 + mixer.momentum)


def handed_on(config: RunConfig, layout: Layout, blocks: list[int]) -> float:
    """Return the bytes that the first of the ranks which share sequences sends in a micro batch, of some blocks.

    It sends the state behind each of its pieces, and the gradient of the state before each but the first.
    """
    train, pieces = config.train, layout.cp * config.train.segments
    size, total = train.seq_len // pieces, 0
    for number in blocks:
        mixer = mixer_of_block(config.model, number)
        for place in range(0, pieces, layout.cp):
            total += carried_bytes(config, mixer, (place + 1) * size, layout.tp)
            total += carried_bytes(config, mixer, place * size, layout.tp) if place else 0
    return total / layout.tp


def kept_between_pieces(config: RunConfig, layout: Layout, blocks: list[int]) -> float:
    """Return the bytes of the states that a rank keeps in a micro batch: those that its pieces begin with.

    With several pieces on each of several ranks, as many more are on their way. On one rank, the weights stay that the
    last chunk began with: half as much again, as of the gradients of the state behind a piece that is run again. What
    kernels pack for a piece to begin with counts among its activations.
    """
    train, pieces = config.train, layout.cp * config.train.segments
    size, last, total = train.seq_len // pieces, layout.cp - 1, 0.0
    places = [place for place in range(last, pieces, layout.cp) if place]
    several, packed = 1.5 if layout.cp == 1 else 2 if train.segments > 1 else 1, []
    for mixer in (mixer_of_block(config.model, number) for number in blocks):
        if (state := _packed_state(config, layout, mixer)) is None:
            total += several * sum(carried_bytes(config, mixer, place * size, layout.tp) for place in places)
        else:
            beside = sum(_beside_packed(config, mixer, place * size, layout.tp) for place in places)
            total += several * (len(places) * state + beside)
            packed.append(state)
    if train.segments == 2:  # the piece that is run again begins with the learned weights, packed for all sequences
        total -= (1 - 1 / train.micro_batch_size) * sum(packed)
    return (total - max(packed, default=0) / 2) / layout.tp  # packed are the gradients of the block whose turn it is


def made_again(config: RunConfig, layout: Layout, blocks: list[int]) -> float:
    """Return the bytes beside those between pieces when kernels have run a piece again.

    These are the states behind it, and what the programs of a block compute with.
    """
    micro, packed, beside, programs = MicroBatch.of(config.train, layout), [], 0, 0.0
    for mixer in (mixer_of_block(config.model, number) for number in blocks):
        if (state := _packed_state(config, layout, mixer)) is not None:
            packed.append(state)
            beside += _beside_packed(config, mixer, config.train.seq_len, layout.tp)
            programs = max(programs, forward_workspace(config.model, mixer, micro))
    return (1.5 * (sum(packed) + beside) + max(packed, default=0) / 2) / layout.tp + programs


def _beside_packed(config: RunConfig, mixer: MixerConfig, position: int, tp: int) -> int:
    """Return the bytes of what is handed on beside packed memories, as `carried_bytes` does.

    It is the convolution's tail, a far memory, keys and values, and tokens of a chunk that is not at its end.
    """
    entries = _memories(config.model, memory_parts(mixer)[0])
    memories = FP32 * config.train.micro_batch_size * config.model.num_heads * entries
    return carried_bytes(config, mixer, position, tp) - memories


def _packed_state(config: RunConfig, layout: Layout, mixer: MixerConfig) -> int | None:
    """Return the bytes that kernels hand on to the next piece on the same rank; None where there is none, or no kernel.

    Those of all heads, as of `carried_bytes`.
    """
    model, train = config.model, config.train
    if layout.cp > 1 or train.segments == 1 or not isinstance(mixer, SelfModifyingConfig):
        return None
    if not runs_kernels(model, mixer, MicroBatch.of(train, layout), effective_recompute(config, mixer)):
        return None
    return FP32 * train.micro_batch_size * model.num_heads * packed_size(model, mixer) * (1 + mixer.momentum)
