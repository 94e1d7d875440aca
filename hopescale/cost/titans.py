"""Parameters, operations and activations of Titans' compositions: those of their parts, and of the joints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hopescale.config.model_shape import head_dim, memory_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.titans import titans_attention
from hopescale.cost.attention import attention_activations, attention_mixing, attention_parameters
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.operation import NOTHING, OpCost, product
from hopescale.cost.parameter import FP32, ParameterShape
from hopescale.cost.self_modifying import (
    self_modifying_activations,
    self_modifying_mixing,
    self_modifying_parameters,
)


def titans_parameters(model: ModelConfig, mixer: TitansConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, by their names in it."""
    heads, dim, d_model = model.num_heads, head_dim(model), model.d_model
    yield ParameterShape("persistent", (mixer.persistent_tokens, d_model), keep_fp32=True)
    parts = {
        "memory": self_modifying_parameters(model, mixer),
        "attention": attention_parameters(model, titans_attention(mixer)),
    }
    for name, parameters in parts.items():
        for part in parameters:
            if part.name != "out_proj.weight":
                yield replace(part, name=f"{name}.{part.name}")
    norm, out = ParameterShape("norm.weight", (heads, dim), 0, keep_fp32=True), (d_model, heads * dim)
    if mixer.composition == "mac":
        yield ParameterShape("context.query_proj.weight", (heads * dim, d_model), 0)
        yield replace(norm, name="context.norm.weight")
        yield ParameterShape("context.out_proj.weight", out, 1)
    if mixer.composition != "mag":
        yield ParameterShape("inner_proj.weight", out, 1)
    if mixer.composition != "mal":
        yield norm
    yield ParameterShape("out_proj.weight", out, 1)


def titans_maps(model: ModelConfig, mixer: TitansConfig) -> OpCost:
    """Count the maps in and out for a token, and those between the parts."""
    between = {"mac": 6, "mag": 0, "mal": 1}[mixer.composition]
    return _maps(model, 3 + mixer.gate + 3 + between + 1)


def _maps(model: ModelConfig, slices: float) -> OpCost:
    return product(1, model.d_model, slices * model.num_heads * head_dim(model))


def titans_mixing(model: ModelConfig, mixer: TitansConfig, seq_len: int, recompute: str | None) -> OpCost:
    """Count memory and attention for a token, persistent tokens included; as `self_modifying_mixing`.

    With MAC and MAG, attention's keys of persistent tokens are made once for a micro batch, and left out.
    """
    count, executed = mixer.persistent_tokens, recompute is not None
    if mixer.composition == "mac":
        memory = self_modifying_mixing(model, mixer, seq_len, recompute)
        size = min(mixer.chunk_size, seq_len)
        keys = count + (2 * size if executed else size + 1)
        return memory + _reads(model, keys, executed) + _retrieved(model, mixer).times(model.num_heads)
    longer = (seq_len + count) / seq_len
    memory = self_modifying_mixing(model, mixer, seq_len + count, recompute).times(longer)
    memory += _maps(model, 3 + mixer.gate + 4 * (mixer.composition == "mal")).times(longer - 1)
    attention = titans_attention(mixer)
    if mixer.composition == "mal":
        return memory + attention_mixing(model, attention, seq_len + count, recompute).times(longer)
    if not executed:
        return memory + attention_mixing(model, attention, seq_len, None) + _reads(model, count, executed)
    return memory + _reads(model, count + _keys_in_blocks(mixer.window or seq_len, seq_len), executed)


def _keys_in_blocks(window: int, seq_len: int) -> float:
    """Count the keys that a token is multiplied with on average: of its block of `window`, and of the one before."""
    first, later = min(window, seq_len), max(0, seq_len - window)
    return (first**2 + -(-later // window) * 2 * window**2) / seq_len


def _reads(model: ModelConfig, keys: float, executed: bool) -> OpCost:
    """Count scores of a token with that many keys, and reads of their values; scores are computed again backward."""
    reads = product(1, head_dim(model), keys).times(2 * model.num_heads)
    return OpCost(reads.forward, 2.5 * reads.forward) if executed else reads


def _retrieved(model: ModelConfig, mixer: TitansConfig) -> OpCost:
    """Count the answer of a head's memory to a token, with fixed weights."""
    dim, hidden = head_dim(model), memory_dim(model, mixer)
    return product(1, dim, hidden or dim) + (NOTHING if hidden is None else product(1, hidden, dim))


def titans_activations(model: ModelConfig, mixer: TitansConfig, micro: MicroBatch, recompute: str) -> Activations:
    """Count a mixer's activations, without its norm's result; `recompute` is that of the memory itself."""
    count, stream, attention = mixer.persistent_tokens, model.d_model * micro.itemsize, titans_attention(mixer)
    longer = replace(micro, tokens=micro.tokens + count * micro.batch, seq_len=micro.seq_len + count)
    if mixer.composition == "mac":
        # Each segment but the first goes on from the one before.
        by_segment = replace(micro, carried=micro.carried or micro.seq_len > mixer.chunk_size)
        memory, read = self_modifying_activations(model, mixer, by_segment, recompute), micro
        kept = _segment_bytes(model, mixer, micro)
    elif mixer.composition == "mag":
        memory, read = self_modifying_activations(model, mixer, longer, recompute), micro
        kept = longer.tokens * stream + _prefixed_bytes(model, mixer, micro) + _gate_bytes(model, micro)
    else:
        memory, read = self_modifying_activations(model, mixer, longer, recompute), longer
        # Tokens with persistent ones, and what attention reads of the memory.
        kept = 2 * longer.tokens * stream + attention_activations(model, attention, longer, recompute).kept
    workspace = max(memory.workspace, attention_activations(model, attention, read, recompute).workspace)
    return Activations(memory.kept + kept, memory.states, workspace)


def _gate_bytes(model: ModelConfig, micro: MicroBatch) -> float:
    """Count attention's answers through norm and gate: in float32, scaled, after the norm, and gated."""
    heads, dim = model.num_heads / micro.tp, head_dim(model)
    wide = 1 if micro.itemsize == FP32 else 2
    return micro.tokens * heads * ((wide * dim + 1) * FP32 + 2 * dim * micro.itemsize)


def _prefixed_bytes(model: ModelConfig, mixer: TitansConfig, micro: MicroBatch) -> float:
    """Count queries and answers, and keys and values with those of persistent tokens in front of each block."""
    heads, count, window = model.num_heads / micro.tp, mixer.persistent_tokens, mixer.window or micro.seq_len
    width = heads * head_dim(model) * micro.itemsize
    first, later = min(window, micro.seq_len), max(0, micro.seq_len - window)
    blocks = -(-later // window)
    rows = 2 * micro.seq_len + 2 * (count + first)
    if blocks:
        rows += first + blocks * (2 * window + 2 * (count + 2 * window))
    masks = first * (count + first) + (blocks > 0) * window * (count + 2 * window)
    return micro.batch * rows * width + micro.tokens * heads * FP32 + masks * micro.itemsize


def _segment_bytes(model: ModelConfig, mixer: TitansConfig, micro: MicroBatch) -> float:
    """Count the activations of segments beside the memory's: retrieved tokens, and attention with its gate."""
    heads, dim, hidden = model.num_heads / micro.tp, head_dim(model), memory_dim(model, mixer) or 0
    width, size = heads * dim, min(mixer.chunk_size, micro.seq_len)
    # Queries before and after they are scaled, the memory's hidden values twice, its answers and them scaled.
    kept = (4 * width + 2 * heads * (hidden + 1)) * FP32 + width * micro.itemsize
    # Queries and answers, these in order, keys and values; what was retrieved, and what is written.
    keys = mixer.persistent_tokens + 2 * size
    kept += (3 * width + 2 * keys / size * width + 2 * model.d_model) * micro.itemsize + heads * FP32
    # The tails of convolutions, and masks.
    segments, tail = micro.seq_len / size, (mixer.conv_width or 1) - 1
    once = segments * (3 * tail * width * micro.batch + size * keys) * micro.itemsize
    return micro.tokens * kept + once + _gate_bytes(model, micro)
