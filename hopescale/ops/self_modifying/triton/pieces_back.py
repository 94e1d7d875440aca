"""The way back through `pieces.py`: what a piece of a chunk did to one memory, and its tables."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.gradients import gates_back
from hopescale.ops.delta_rule.triton.tables import decay_weights
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, open_keys, read_layer
from hopescale.ops.self_modifying.triton.layers_back import carry_back, move_back, read_back, read_states_back
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, slope
from hopescale.ops.self_modifying.triton.memories import first_layer, second_layer, write
from hopescale.ops.self_modifying.triton.memories_back import write_linear_back, write_mlp_back


@triton.jit
def clear(scratch, INDEX: tl.constexpr, WIDTH: tl.constexpr, CONFIG: tl.constexpr):
    """Set a matrix of tokens to 0."""
    ROWS: tl.constexpr = CONFIG.rows
    put(at.whole(scratch, INDEX, WIDTH, CONFIG), tl.zeros((ROWS, WIDTH), tl.float32))


@triton.jit
def clear_piece(scratch, CONFIG: tl.constexpr):
    """Set to 0 what gradients gather in over all memories."""
    ROWS: tl.constexpr = CONFIG.rows
    for index in tl.static_range(at.D_RATE, at.ROWS):
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
    gradient = d_y
    if CONFIG.mlp:
        add(at.whole(scratch, at.D_Q, D, CONFIG), load_rows(d_y, exists, D))
        inner, keys, gradient = at.matrix(scratch, at.INNER, CONFIG), at.matrix(scratch, at.KEYS, CONFIG), d_y
        pre = read_layer(q, k, exists, 0, before, scratch, at.VALUES, CONFIG.columns, D, E, CONFIG)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), pre)
        put(at.whole(scratch, at.INNER, E, CONFIG), pre * tl.sigmoid(pre))
        d_inner = read_back(
            inner, keys, exists, d_y, CONFIG.second, before, scratch, at.SECOND, at.D_KEYS, D, E, D, CONFIG
        )
        pre = tl.load(at.whole(scratch, at.D_INNER, E, CONFIG))
        gate = tl.sigmoid(pre)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), d_inner * slope(gate, pre * gate))
        gradient = at.matrix(scratch, at.D_INNER, CONFIG)
    d_q = read_back(q, k, exists, gradient, 0, before, scratch, at.VALUES, at.D_K, CONFIG.columns, D, E, CONFIG)
    add(at.whole(scratch, at.D_Q, D, CONFIG), d_q)


@triton.jit
def write_again(memory, inputs, exists, slots, scratch, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Compute again what a memory wrote and held, and make room for the gradients."""
    k, v, q = inputs
    start, before = slots
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    FIRST: tl.constexpr = CONFIG.hidden if CONFIG.mlp else N
    offset = first_layer(memory, NARROW, CONFIG)
    write(k, v, exists, start[0], memory, scratch, NARROW, True, CONFIG)
    hold(k, exists, offset, before, scratch, at.SIMILAR, at.VALUES, CONFIG.columns, CONFIG.dim, FIRST, CONFIG)
    clear(scratch, at.D_VALUES, FIRST, CONFIG)
    clear(scratch, at.D_HELD, FIRST, CONFIG)
    if CONFIG.mlp:
        keys, offset = at.matrix(scratch, at.KEYS, CONFIG), second_layer(memory, NARROW, CONFIG)
        open_keys(keys, exists, scratch, at.SECOND_SIMILAR, FIRST, CONFIG)
        hold(keys, exists, offset, before, scratch, at.SECOND_SIMILAR, at.SECOND, N, FIRST, N, CONFIG)
        clear(scratch, at.D_SECOND, N, CONFIG)
        clear(scratch, at.D_SECOND_HELD, N, CONFIG)
        clear(scratch, at.D_KEYS, FIRST, CONFIG)


@triton.jit
def pass_memory_back(memory, inputs, exists, slots, backs, d_y, scratch, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Do the way back through `pass_memory`.

    Args:
        slots: Point to packed weights and momentum at the chunk's start and before the piece.
        backs: Point to packed gradients of those at the chunk's start, and of those after the piece, which become
            those before it.
        d_y: Points to the gradient of the first token's output.
    """
    k, v, q = inputs
    start, before = slots
    d_start, back = backs
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    FIRST: tl.constexpr = CONFIG.hidden if CONFIG.mlp else N
    ROW: tl.constexpr = CONFIG.columns
    READS: tl.constexpr = not NARROW and CONFIG.read != "boundary"
    write_again(memory, inputs, exists, slots, scratch, NARROW, CONFIG)
    if READS and memory == 0:
        read_memory_back(inputs, exists, before, d_y, scratch, CONFIG)
    if CONFIG.mlp:
        SECOND: tl.constexpr = at.SECOND_SIMILAR
        keys, offset = at.matrix(scratch, at.KEYS, CONFIG), second_layer(memory, NARROW, CONFIG)
        move_back(keys, exists, offset, before, back, scratch, SECOND, at.SECOND, at.D_KEYS, N, FIRST, N, CONFIG)
        carry_back(keys, exists, offset, before, back, scratch, N, FIRST, N, CONFIG)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, CONFIG)
            read_states_back(inner, exists, d_y, offset, back, scratch, N, FIRST, N, CONFIG)
    offset = first_layer(memory, NARROW, CONFIG)
    move_back(k, exists, offset, before, back, scratch, at.SIMILAR, at.VALUES, at.D_K, ROW, CONFIG.dim, FIRST, CONFIG)
    carry_back(k, exists, offset, before, back, scratch, ROW, CONFIG.dim, FIRST, CONFIG)
    if READS and memory == 0:
        gradient = d_y
        if CONFIG.mlp:
            gradient = at.matrix(scratch, at.D_INNER, CONFIG)
        read_states_back(q, exists, gradient, offset, back, scratch, ROW, CONFIG.dim, FIRST, CONFIG)
    if CONFIG.mlp:
        write_mlp_back(k, v, exists, start[0], d_start, memory, scratch, NARROW, CONFIG)
    else:
        write_linear_back(k, v, exists, start[0], d_start, memory, scratch, NARROW, CONFIG)


@triton.jit
def tables_back(size, scratch, CONFIG: tl.constexpr):
    """Return the gradients of `alpha` and `mu` `[C]` from those of tables and of the last of their weights."""
    rows, pushes = tl.arange(0, CONFIG.rows), None
    retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
    push_retention = retention
    if CONFIG.momentum:
        pushes = scratch + at.MU * CONFIG.rows
        push_retention = tl.load(at.row(scratch, at.MU, CONFIG))
    decay = decay_weights(scratch + at.ALPHA * CONFIG.rows, pushes, rows, 1, rows, size, CONFIG.precision)
    ends, last = tl.where(rows == size - 1, 1.0, 0.0), scratch + at.D_LAST * CONFIG.rows
    kept, write = tl.load(at.table(scratch, at.D_KEPT, CONFIG)), tl.load(at.table(scratch, at.D_WRITE, CONFIG))
    read_kept = tl.load(at.table(scratch, at.D_READ_KEPT, CONFIG))
    read_write = tl.load(at.table(scratch, at.D_READ_WRITE, CONFIG))
    wrote, erase = tl.load(at.row(scratch, at.D_WROTE, CONFIG)), tl.load(at.row(scratch, at.D_ERASED, CONFIG))
    if not CONFIG.momentum:  # writes and erases weigh the same
        kept, read_kept, erase = kept + write, read_kept + read_write, erase + wrote
    start, push = tl.load(at.row(scratch, at.D_START, CONFIG)), tl.load(at.row(scratch, at.D_PUSHED, CONFIG))
    before = (kept, start, write, push)
    kept, write = ends[:, None] * erase[None, :], ends[:, None] * wrote[None, :]
    after = (kept, ends * tl.load(last), write, ends * tl.load(last + 1))
    start, push = tl.load(at.row(scratch, at.D_READ_START, CONFIG)), tl.load(at.row(scratch, at.D_READ_PUSHED, CONFIG))
    if CONFIG.read == "inclusive":
        after = (after[0] + read_kept, after[1] + start, after[2] + read_write, after[3] + push)
    else:
        before = (before[0] + read_kept, before[1] + start, before[2] + read_write, before[3] + push)
    link = ends[:, None] * tl.load(at.row(scratch, at.D_LINK, CONFIG))[None, :]
    kept = ends * tl.load(last + 2)
    return gates_back(
        decay, before, after, link, kept, retention, push_retention, rows, CONFIG.momentum, CONFIG.precision
    )
