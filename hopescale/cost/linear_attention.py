"""Parameters, operations and activations of linear attention, as `ops.delta_rule.gated_delta_rule` runs it.

Operations are those of matrix products and triangular solves, for a token; activations are the tensors that torch keeps
for the backward, on one rank. The first chunk and one that the sequence cuts short count like all others. Letters: `C`
tokens of a chunk, `D` width of a key, `Do` width of a value, `S` heads of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hopescale.config.linear_attention import LinearSizes
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.operation import OpCost, product, solve
from hopescale.cost.parameter import FP32, ParameterShape


def linear_attention_parameters(model: ModelConfig, config: LinearAttentionConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, in its order, by their names in it."""
    sizes, fp32 = LinearSizes.of(model, config), {"keep_fp32": True}
    yield ParameterShape("in_proj.weight", (sizes.groups * sizes.group_inputs, model.d_model), 0, parts=sizes.parts)
    if config.conv_width:
        channels = sizes.groups * sizes.group_streams
        yield ParameterShape("conv.weight", (channels, config.conv_width), 0, **fp32)
        if config.conv_bias:
            yield ParameterShape("conv.bias", (channels,), 0, **fp32)
    for name in ("A_log", "dt_bias") * (config.decay == "input") + ("D",) * config.skip:
        yield ParameterShape(f"gates.{name}", (sizes.heads,), 0, **fp32)
    if config.norm_weight == "shared":
        yield ParameterShape("norm.weight", (sizes.value_dim,), **fp32)
    elif config.norm_weight == "own":
        shape = (sizes.heads, sizes.value_dim) if config.norm == "head" else (sizes.groups, sizes.group_values)
        yield ParameterShape("norm.weight", shape, 0, **fp32)
    yield ParameterShape("out_proj.weight", (model.d_model, sizes.width), 1)


def linear_attention_maps(model: ModelConfig, config: LinearAttentionConfig) -> OpCost:
    """Count the maps in and out for a token."""
    sizes = LinearSizes.of(model, config)
    return product(1, model.d_model, sizes.groups * sizes.group_inputs + sizes.width)


def linear_attention_mixing(
    model: ModelConfig, config: LinearAttentionConfig, seq_len: int, recompute: str | None
) -> OpCost:
    """Count writes and reads of all memories for a token, on average over a sequence.

    The mixer itself computes nothing again, whatever `recompute` says.
    """
    sizes, chunk = LinearSizes.of(model, config), min(config.chunk_size, seq_len)
    keys, value = sizes.key_dim, sizes.value_dim
    scores = product(chunk, keys, chunk)
    # Reads of the chunk's first state, and what enters the last one; reads of what was written in the chunk.
    each = scores + product(chunk, keys, sizes.group_values).times(2)
    each += product(chunk, chunk, value).times(sizes.shared_by)
    if config.erase:
        each += scores + (solve(chunk, value + keys) + product(chunk, keys, value)).times(sizes.shared_by)
    return each.times(sizes.groups / chunk)


def linear_attention_state(model: ModelConfig, config: LinearAttentionConfig) -> dict[str, int]:
    """Count the entries that a sequence carries from call to call, by their names in the layer's state."""
    sizes = LinearSizes.of(model, config)
    entries = {"memory": sizes.heads * sizes.key_dim * sizes.value_dim}
    if config.conv_width:
        entries["conv_tail"] = (config.conv_width - 1) * sizes.groups * sizes.group_streams
    return entries


def linear_attention_activations(
    model: ModelConfig, config: LinearAttentionConfig, micro: MicroBatch, recompute: str
) -> Activations:
    """Count a mixer, without its norm's result.

    The mixer itself computes nothing again, whatever `recompute` says.
    """
    sizes, chunk = LinearSizes.of(model, config), min(config.chunk_size, micro.seq_len)
    own = replace(sizes, groups=sizes.groups / micro.tp)  # of a rank
    entries = _memory_entries(config, own, chunk) + _answer_entries(config, own)
    kept = micro.tokens * (entries * FP32 + _stream_bytes(config, own, micro.itemsize))
    if config.conv_width:
        kept += (config.conv_width - 1) * micro.batch * own.groups * own.group_streams * micro.itemsize
    if config.rotary:
        kept += micro.seq_len * own.key_dim * FP32
    # States between chunks are there side by side, and as they come if anything else is multiplied with them.
    copies = 2 if config.erase or config.decay == "input" else 1
    states = copies * micro.tokens / chunk * own.heads * own.key_dim * own.value_dim * FP32
    # The gradients of tables and of what was solved, of values and answers, and of the in-projection's result.
    gradients = own.heads * (3 * chunk + 2 * (own.key_dim + own.value_dim) + 2 * own.value_dim)
    workspace = micro.tokens * (gradients * FP32 + 2 * own.groups * own.group_inputs * micro.itemsize)
    return Activations(kept, states, workspace)


def _stream_bytes(config: LinearAttentionConfig, sizes: LinearSizes, itemsize: int) -> float:
    """Count a token's activations from the in-projection to the memories, and the input of the out-projection."""
    kept = sizes.width * itemsize
    if config.conv_width:
        kept += sizes.groups * sizes.group_streams * itemsize
    whole = sizes.group_inputs if itemsize == FP32 and not config.conv_width else sizes.group_streams
    # What is scaled to unit length is kept with all that lies beside it; so are the values of a single group.
    if config.key_norm == "l2" or (config.skip and sizes.groups == 1):
        kept += sizes.groups * whole * FP32
    return kept + (config.skip and sizes.groups > 1) * sizes.width * FP32


def _memory_entries(config: LinearAttentionConfig, sizes: LinearSizes, chunk: int) -> float:
    """Count the float32 entries of a token from streams to answers, without the states."""
    heads, groups, keys, width = sizes.heads, sizes.groups, sizes.key_dim, sizes.width
    learned, rated = config.decay == "input", config.write != "one"
    entries = 2 * groups * (keys + (config.key_norm == "l2"))
    # Products of decays between tokens and from the chunk's start, the same times scores, and scores.
    entries += heads * (2 * chunk + 2) + learned * groups * chunk
    # The step before and after softplus, the sigmoid, rates by chunk; rated values, and what the first state answers.
    entries += heads * (2 * learned + (config.write == "sigmoid") + rated) + width * (rated + learned)
    if not config.erase:
        return entries + 2 * width  # what is written, and its part in the last state
    # The system twice, similarities, its solution, keys by their part in the last state, and what is written twice.
    entries += heads * (2 * chunk + keys + 1 + (not rated)) + (rated or learned) * groups * chunk
    return entries + heads * (keys + sizes.value_dim) + 2 * width


def _answer_entries(config: LinearAttentionConfig, sizes: LinearSizes) -> float:
    """Count the float32 entries of a token's answers through norm and gate."""
    spans = sizes.heads if config.norm == "head" else sizes.groups
    return sizes.width * (1 + 3 * sizes.gated + (config.norm_weight != "none")) + spans
