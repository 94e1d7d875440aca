"""The way back through `pieces.py`: what a piece of a chunk did to one memory, and its tables."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, open_keys, read_layer
from hopescale.ops.self_modifying.triton.layers_back import carry_back, move_back, read_back, read_states_back
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, slope
from hopescale.ops.self_modifying.triton.memories import write
from hopescale.ops.self_modifying.triton.memories_back import write_linear_back, write_mlp_back
from hopescale.ops.self_modifying.triton.pieces import layers_at
from hopescale.ops.self_modifying.triton.tables import decay_weights, gates_back


@triton.jit
def clear(scratch, INDEX: tl.constexpr, WIDTH: tl.constexpr, CONFIG: tl.constexpr):
    """Set a matrix of tokens to 0."""
    ROWS: tl.constexpr = CONFIG.rows
    put(at.whole(scratch, INDEX, WIDTH, CONFIG), tl.zeros((ROWS, WIDTH), tl.float32))


@triton.jit
def clear_piece(scratch, CONFIG: tl.constexpr):
    """Set to 0 what gradients gather in over all memories."""
    ROWS: tl.constexpr = CONFIG.rows
    for index in tl.static_range(at.D_RATE, at.D_LAST + 1):
        put(at.row(scratch, index, CONFIG), tl.zeros((ROWS,), tl.float32))
    for index in tl.static_range(at.D_KEPT, at.TABLES):
        put(at.table(scratch, index, CONFIG), tl.zeros((ROWS, ROWS), tl.float32))
    for index in tl.static_range(at.D_K, at.D_Q + 1):
        clear(scratch, index, CONFIG.dim, CONFIG)


@triton.jit
def read_memory_back(inputs, exists, before, d_y, scratch, CONFIG: tl.constexpr):
    """Move the gradient of outputs to keys, queries and writes of the memory that was read."""
    k, v, q = inputs
    D: tl.constexpr = CONFIG.dim
    E: tl.constexpr = CONFIG.hidden
    FIRST: tl.constexpr = CONFIG.vectors.first
    SECOND: tl.constexpr = CONFIG.vectors.second
    first, gradient = layers_at(before, 0, FIRST), d_y
    if CONFIG.mlp:
        add(at.whole(scratch, at.D_Q, D, CONFIG), load_rows(d_y, exists, D))
        inner, keys = at.matrix(scratch, at.INNER, CONFIG), at.matrix(scratch, at.KEYS, CONFIG)
        pre = read_layer(q, k, exists, first, scratch, FIRST, CONFIG)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), pre)
        put(at.whole(scratch, at.INNER, E, CONFIG), pre * tl.sigmoid(pre))
        d_inner = read_back(inner, keys, exists, d_y, layers_at(before, 0, SECOND), scratch, SECOND, CONFIG)
        pre = tl.load(at.whole(scratch, at.D_INNER, E, CONFIG))
        gate = tl.sigmoid(pre)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), d_inner * slope(gate, pre * gate))
        gradient = at.matrix(scratch, at.D_INNER, CONFIG)
    d_q = read_back(q, k, exists, gradient, first, scratch, FIRST, CONFIG)
    add(at.whole(scratch, at.D_Q, D, CONFIG), d_q)


@triton.jit
def write_again(memory, inputs, exists, slots, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Compute again what a memory wrote and held, and make room for the gradients."""
    k, v, q = inputs
    start, before = slots
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    write(k, v, exists, start[0], memory, scratch, KIND, True, CONFIG)
    hold(k, exists, layers_at(before, memory, FIRST), scratch, FIRST, CONFIG)
    clear(scratch, at.D_VALUES, FIRST.outputs, CONFIG)
    clear(scratch, at.D_HELD, FIRST.outputs, CONFIG)
    if CONFIG.mlp:
        keys = at.matrix(scratch, at.KEYS, CONFIG)
        open_keys(keys, exists, scratch, SECOND, CONFIG)
        hold(keys, exists, layers_at(before, memory, SECOND), scratch, SECOND, CONFIG)
        clear(scratch, at.D_SECOND, SECOND.outputs, CONFIG)
        clear(scratch, at.D_SECOND_HELD, SECOND.outputs, CONFIG)
        clear(scratch, at.D_KEYS, SECOND.inputs, CONFIG)


@triton.jit
def pass_layer_back(keys, exists, memory, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients back over what a piece did to a layer; returns where those of its weights lie."""
    held, gradients = layers_at(before, memory, LAYER), layers_at(back, memory, LAYER)
    move_back(keys, exists, held, gradients, scratch, LAYER, CONFIG)
    carry_back(keys, exists, held, gradients, scratch, LAYER, CONFIG)
    return gradients


@triton.jit
def pass_memory_back(memory, inputs, exists, slots, backs, d_y, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Do the way back through `pass_memory`.

    Args:
        slots: Pointers to packed weights and momentum at the chunk's start and before the piece.
        backs: Pointers to packed gradients of those at the chunk's start, and of those after the piece, which become
            those before it.
        d_y: Pointer to the gradient of the first token's output.
    """
    k, v, q = inputs
    start, before = slots
    d_start, back = backs
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    READS: tl.constexpr = not KIND.narrow and CONFIG.spec.read != "boundary"
    write_again(memory, inputs, exists, slots, scratch, KIND, CONFIG)
    if READS and memory == 0:
        read_memory_back(inputs, exists, before, d_y, scratch, CONFIG)
    gradient = d_y
    if CONFIG.mlp:
        keys, gradient = at.matrix(scratch, at.KEYS, CONFIG), at.matrix(scratch, at.D_INNER, CONFIG)
        moved = pass_layer_back(keys, exists, memory, before, back, scratch, SECOND, CONFIG)
        if READS and memory == 0:
            read_states_back(at.matrix(scratch, at.INNER, CONFIG), exists, d_y, moved, scratch, SECOND, CONFIG)
    moved = pass_layer_back(k, exists, memory, before, back, scratch, FIRST, CONFIG)
    if READS and memory == 0:
        read_states_back(q, exists, gradient, moved, scratch, FIRST, CONFIG)
    if CONFIG.mlp:
        write_mlp_back(k, v, exists, start[0], d_start, memory, scratch, KIND, CONFIG)
    else:
        write_linear_back(k, v, exists, start[0], d_start, memory, scratch, KIND, CONFIG)


@triton.jit
def tables_back(size, scratch, CONFIG: tl.constexpr):
    """Return the gradients of the logs of `alpha` and `mu` `[C]` from those of tables and of the weights at the end."""
    kept, start, chain, from_start, write, push = decay_weights(scratch, CONFIG)
    d_kept, d_write = tl.load(at.table(scratch, at.D_KEPT, CONFIG)), tl.load(at.table(scratch, at.D_WRITE, CONFIG))
    d_start, d_push = tl.load(at.row(scratch, at.D_START, CONFIG)), tl.load(at.row(scratch, at.D_PUSHED, CONFIG))
    d_chain, d_from_start = tl.zeros_like(d_write), tl.zeros_like(d_push)
    direct = tl.zeros_like(d_start)
    if CONFIG.reading:
        retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
        read_kept = tl.load(at.table(scratch, at.D_KEPT + CONFIG.reading, CONFIG))
        read_write = tl.load(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG))
        read_start = tl.load(at.row(scratch, at.D_START + CONFIG.reading, CONFIG))
        read_push = tl.load(at.row(scratch, at.D_PUSHED + CONFIG.reading, CONFIG))
        if not CONFIG.momentum:
            read_kept, read_start = read_kept + read_write, read_start + read_push
        direct = tl.sum(read_kept * kept, 1) + read_start * start
        if CONFIG.momentum:
            direct += tl.sum(read_write * write, 1) + read_push * push
            d_chain, d_from_start = read_write, read_push
            d_write, d_push = d_write + retention[:, None] * read_write, d_push + retention * read_push
        d_kept, d_start = d_kept + retention[:, None] * read_kept, d_start + retention * read_start
        direct *= retention
    if not CONFIG.momentum:  # writes and erases weigh the same
        d_kept, d_start = d_kept + d_write, d_start + d_push
    decay = kept, start, chain, from_start, write, push
    d_decay = d_kept, d_start, d_chain, d_from_start, d_write, d_push
    d_alpha, d_mu = gates_back(decay, d_decay, size, scratch, CONFIG)
    return d_alpha + direct, d_mu
