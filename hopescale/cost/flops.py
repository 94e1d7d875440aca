"""Floating-point operations of a model per token of training, counted from its config alone. Imports no torch.

A multiply and an add are two operations. Norms, activations and gates are left out: they are below one percent.
"""

from __future__ import annotations

from hopescale.config.plan import (
    head_dim,
    kv_heads,
    levels_of_block,
    memory_dim,
    padded_vocab_size,
    projection_chunk_size,
)
from hopescale.config.schema import ModelConfig
from hopescale.cost.params import gate_memories, num_projections, wide_memories

BACKWARD_FACTOR = 3
"""Forward and backward together, in forwards: backward makes the gradients of both factors of every product."""


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Count the operations of one token's forward and backward, averaged over a sequence of `seq_len` tokens.

    Nothing is added for activations that are computed twice, so that the number measures the model, not the run.
    """
    head = 2 * padded_vocab_size(model) * model.d_model
    return BACKWARD_FACTOR * (head + model.num_layers * (mixer_flops(model, seq_len) + level_flops(model)))


def level_flops(model: ModelConfig) -> int:
    """Count the forward of one block's levels, which cost the same in all blocks: three products each."""
    return sum(6 * model.d_model * level.d_ff for level in levels_of_block(model, 0).values())


def mixer_flops(model: ModelConfig, seq_len: int) -> int:
    """Count one mixer's forward for a token in the middle of a sequence."""
    if model.mixer == "attention":
        return attention_flops(model, seq_len)
    return self_modifying_flops(model, seq_len)


def attention_flops(model: ModelConfig, seq_len: int) -> int:
    """Count the maps, and scores and reads over the tokens before: `(seq_len + 1) / 2` of them on average."""
    width, kv_width = model.num_heads * head_dim(model), kv_heads(model) * head_dim(model)
    return 4 * model.d_model * (width + kv_width) + 2 * width * (seq_len + 1)


def self_modifying_flops(model: ModelConfig, seq_len: int) -> int:
    """Count the maps in and out, the convolution, and every head's memories in their chunked form."""
    mixer, width = model.self_modifying, model.num_heads * head_dim(model)
    maps = 2 * model.d_model * width * (num_projections(model) + 1)
    conv = 2 * (num_projections(model) - mixer.gate) * width * (mixer.conv_width or 0)
    main_chunk = min(mixer.chunk_size, seq_len)
    main = _memory_flops(model, head_dim(model), main_chunk) + _in_chunk_read_flops(model, main_chunk)
    chunk = min(projection_chunk_size(model), seq_len)
    projections = (wide_memories(model) - 1) * _memory_flops(model, head_dim(model), chunk)
    gates = gate_memories(model) * _memory_flops(model, 1, chunk)
    return maps + conv + model.num_heads * (main + projections + gates)


def _memory_flops(model: ModelConfig, out_dim: int, chunk: int) -> int:
    """Count one memory's read at a boundary, target, inner gradient and write for a token."""
    shapes, hidden = _matrices(model, out_dim), memory_dim(model)
    total = sum(_read_flops(model, *shape) + _write_flops(model, *shape, chunk) for shape in shapes)
    return total if hidden is None else total + 2 * hidden * out_dim  # the error goes back through the second matrix


def _matrices(model: ModelConfig, out_dim: int) -> list[tuple[int, int]]:
    """List the matrices of a memory as (width in, width out)."""
    wide, hidden = head_dim(model), memory_dim(model)
    return [(wide, out_dim)] if hidden is None else [(wide, hidden), (hidden, out_dim)]


def _read_flops(model: ModelConfig, in_dim: int, out_dim: int) -> int:
    """Count the products with the state: the read, the inner loss's forward, and a target of the memory's own."""
    num_products = 3 if model.self_modifying.targets == "self" else 2
    return num_products * 2 * in_dim * out_dim


def _write_flops(model: ModelConfig, in_dim: int, out_dim: int, chunk: int) -> int:
    """Count one matrix's write: an outer product into each state and, with the erase, what the key reads.

    The erase reads each state by key and solves a triangular system of the chunk's size. Tables inside a chunk are
    triangular: half of them is counted.
    """
    num_states = 1 + model.self_modifying.momentum
    flops = num_states * 2 * in_dim * out_dim
    if model.self_modifying.inner_rule == "dgd":
        flops += num_states * 2 * in_dim * out_dim + chunk * (in_dim + 2 * out_dim)
    return flops


def _in_chunk_read_flops(model: ModelConfig, chunk: int) -> int:
    """Count what a read of the main memory sees beyond the boundary: momentum, writes and erases of its chunk."""
    mixer = model.self_modifying
    if mixer.read == "boundary":
        return 0
    tables = 1 + (mixer.inner_rule == "dgd")
    return sum(
        mixer.momentum * 2 * in_dim * out_dim + chunk * (in_dim + tables * out_dim)
        for in_dim, out_dim in _matrices(model, head_dim(model))
    )
