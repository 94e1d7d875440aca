"""Parameters, operations and activations of test-time training, as `ops.ttt` runs it.

Operations are those of matrix products, for a token; activations are the tensors that torch keeps for the backward, on
one rank. The first mini-batch and one that the sequence cuts short count like all others. Letters: `C` tokens of a
mini-batch, `D` width of a head, `E` hidden width of a memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.config.ttt import ttt_hidden, ttt_parts, ttt_slices
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.operation import NOTHING, OpCost, product
from hopescale.cost.parameter import FP32, ParameterShape


def ttt_parameters(model: ModelConfig, config: TttConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, in its order, by their names in it."""
    heads, dim, fp32 = model.num_heads, head_dim(model), {"keep_fp32": True}
    shape = heads * (ttt_slices(config) * dim + 1), model.d_model
    yield ParameterShape("in_proj.weight", shape, 0, parts=ttt_parts(model, config))
    if config.conv_width:
        yield ParameterShape("conv.weight", (2 * heads * dim, config.conv_width), 0, **fp32)
        yield ParameterShape("conv.bias", (2 * heads * dim,), 0, **fp32)
    layers = _layers(model, config)
    for number, (size_in, size_out) in enumerate(layers, 1):
        yield ParameterShape(f"banks.w{number}", (heads, size_out, size_in), 0, **fp32)
    yield ParameterShape("gates.rate", (heads,), 0, **fp32)
    yield ParameterShape("gates.place", (config.chunk_size,), **fp32)
    for number, (_, size_out) in enumerate(layers, 1):
        yield ParameterShape(f"gates.b{number}", (heads, size_out), 0, **fp32)
    for name in ("gates.gamma", "gates.beta", "norm.weight", "norm.bias"):
        yield ParameterShape(name, (heads, dim), 0, **fp32)
    yield ParameterShape("out_proj.weight", (model.d_model, heads * dim), 1)


def _layers(model: ModelConfig, config: TttConfig) -> list[tuple[int, int]]:
    """Return inputs and outputs of a memory's layers."""
    dim, hidden = head_dim(model), ttt_hidden(model, config)
    return [(dim, dim)] if hidden is None else [(dim, hidden), (hidden, dim)]


def ttt_maps(model: ModelConfig, config: TttConfig) -> OpCost:
    """Count the maps in and out for a token."""
    heads, dim = model.num_heads, head_dim(model)
    return product(1, model.d_model, heads * (ttt_slices(config) * dim + 1) + heads * dim)


def ttt_mixing(model: ModelConfig, config: TttConfig, seq_len: int, recompute: str | None) -> OpCost:
    """Count the learning and the answers of all memories for a token, on average over a sequence.

    The mixer itself computes nothing again, whatever `recompute` says.
    """
    chunk, each = min(config.chunk_size, seq_len), NOTHING
    layers = _layers(model, config)
    for size_in, size_out in layers:
        # Answers to keys and queries, and the step; similarities, and what the steps move answers by.
        each += product(chunk, size_in, size_out).times(3)
        each += product(chunk, size_in, chunk) + product(chunk, chunk, size_out)
    for size_in, size_out in layers[1:]:
        each += product(chunk, size_out, size_in)  # the gradient's way back
    return each.times(model.num_heads / chunk)


def ttt_state(model: ModelConfig, config: TttConfig) -> dict[str, int]:
    """Count the entries that a sequence carries from call to call, by their names in the layer's state."""
    heads, entries = model.num_heads, {}
    for part in ("weights", "sums"):
        for number, (size_in, size_out) in enumerate(_layers(model, config), 1):
            entries[f"memory/{part}/w{number}"] = heads * size_in * size_out
            entries[f"memory/{part}/b{number}"] = heads * size_out
    if config.conv_width:
        entries["conv_tail"] = (config.conv_width - 1) * heads * head_dim(model)
    return entries


def ttt_activations(model: ModelConfig, config: TttConfig, micro: MicroBatch, recompute: str) -> Activations:
    """Count a mixer, without its norm's result.

    The mixer itself computes nothing again, whatever `recompute` says.
    """
    heads, dim, chunk = model.num_heads / micro.tp, head_dim(model), min(config.chunk_size, micro.seq_len)
    layers, hidden = _layers(model, config), ttt_hidden(model, config) or 0
    # Queries and keys by head, answers and gradients through both layer norms, tables of a mini-batch by layer.
    per_head = 12 * dim + 14 * hidden + 2 * chunk * len(layers) + 4
    # The norm over all heads keeps its input, centred, and what it is scaled to.
    kept = micro.tokens * (heads * (per_head + 2 * dim) + 1) * FP32 + micro.seq_len * dim * FP32
    kept += micro.tokens * heads * dim * micro.itemsize  # what goes into the out-projection
    if config.gate:
        kept += micro.tokens * heads * 3 * dim * micro.itemsize
    if config.conv_width:
        rows = micro.tokens + (config.conv_width - 1) * micro.batch
        kept += 2 * rows * heads * dim * micro.itemsize
    # The weights that a mini-batch begins with, and its steps.
    state = sum(2 * size_in * size_out + size_out for size_in, size_out in layers)
    states = micro.tokens / chunk * heads * state * FP32
    gradients = heads * (6 * dim + 4 * hidden) + heads * dim
    workspace = micro.tokens * (gradients * FP32 + 2 * heads * (ttt_slices(config) * dim + 1) * micro.itemsize)
    return Activations(kept, states, workspace)
