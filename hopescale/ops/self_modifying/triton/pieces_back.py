"""The way back through `pieces.py`: what a piece of a chunk did to one memory, and its tables."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.gradients import gates_back
from hopescale.ops.delta_rule.triton.tables import chunk_tables
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, open_keys, read_layer
from hopescale.ops.self_modifying.triton.layers_back import carry_back, move_back, read_back, read_states_back
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, slope
from hopescale.ops.self_modifying.triton.memories import first_layer, second_layer, write
from hopescale.ops.self_modifying.triton.memories_back import write_linear_back, write_mlp_back


@triton.jit
def clear(scratch, INDEX: tl.constexpr, WIDTH: tl.constexpr, PLAN: tl.constexpr):
    """Set a matrix of tokens to 0."""
    ROWS: tl.constexpr = PLAN.rows
    put(at.whole(scratch, INDEX, WIDTH, PLAN), tl.zeros((ROWS, WIDTH), tl.float32))


@triton.jit
def clear_piece(scratch, PLAN: tl.constexpr):
    """Set to 0 what gradients gather in over all memories."""
    ROWS: tl.constexpr = PLAN.rows
    for index in tl.static_range(at.D_RATE, at.ROWS):
        put(at.row(scratch, index, PLAN), tl.zeros((ROWS,), tl.float32))
    for index in tl.static_range(at.D_KEPT, at.TABLES):
        put(at.table(scratch, index, PLAN), tl.zeros((ROWS, ROWS), tl.float32))
    for index in tl.static_range(at.D_K, at.D_Q + 1):
        clear(scratch, index, PLAN.dim, PLAN)


@triton.jit
def read_memory_back(made, exists, before, d_y, scratch, PLAN: tl.constexpr):
    """Move the gradient of outputs to keys, queries and writes of the memory that was read."""
    k, v, q = made
    D: tl.constexpr = PLAN.dim
    E: tl.constexpr = PLAN.hidden
    gradient = d_y
    if PLAN.mlp:
        add(at.whole(scratch, at.D_Q, D, PLAN), load_rows(d_y, exists, D))
        inner, keys, gradient = at.matrix(scratch, at.INNER, PLAN), at.matrix(scratch, at.KEYS, PLAN), d_y
        pre = read_layer(q, k, exists, 0, before, scratch, at.VALUES, PLAN.columns, D, E, PLAN)
        put(at.whole(scratch, at.D_INNER, E, PLAN), pre)
        put(at.whole(scratch, at.INNER, E, PLAN), pre * tl.sigmoid(pre))
        d_inner = read_back(inner, keys, exists, d_y, PLAN.second, before, scratch, at.SECOND, at.D_KEYS, D, E, D, PLAN)
        pre = tl.load(at.whole(scratch, at.D_INNER, E, PLAN))
        gate = tl.sigmoid(pre)
        put(at.whole(scratch, at.D_INNER, E, PLAN), d_inner * slope(gate, pre * gate))
        gradient = at.matrix(scratch, at.D_INNER, PLAN)
    d_q = read_back(q, k, exists, gradient, 0, before, scratch, at.VALUES, at.D_K, PLAN.columns, D, E, PLAN)
    add(at.whole(scratch, at.D_Q, D, PLAN), d_q)


@triton.jit
def write_again(memory, made, exists, places, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Compute again what a memory wrote and held, and make room for the gradients."""
    k, v, q = made
    start, before = places
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    FIRST: tl.constexpr = PLAN.hidden if PLAN.mlp else N
    offset = first_layer(memory, NARROW, PLAN)
    write(k, v, exists, start[0], memory, scratch, NARROW, True, PLAN)
    hold(k, exists, offset, before, scratch, at.SIMILAR, at.VALUES, PLAN.columns, PLAN.dim, FIRST, PLAN)
    clear(scratch, at.D_VALUES, FIRST, PLAN)
    clear(scratch, at.D_HELD, FIRST, PLAN)
    if PLAN.mlp:
        keys, offset = at.matrix(scratch, at.KEYS, PLAN), second_layer(memory, NARROW, PLAN)
        open_keys(keys, exists, scratch, at.SECOND_SIMILAR, FIRST, PLAN)
        hold(keys, exists, offset, before, scratch, at.SECOND_SIMILAR, at.SECOND, N, FIRST, N, PLAN)
        clear(scratch, at.D_SECOND, N, PLAN)
        clear(scratch, at.D_SECOND_HELD, N, PLAN)
        clear(scratch, at.D_KEYS, FIRST, PLAN)


@triton.jit
def pass_memory_back(memory, made, exists, places, backs, d_y, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Do the way back through `pass_memory`.

    Args:
        places: Point to packed weights and momentum at the chunk's start and before the piece.
        backs: Point to packed gradients of those at the chunk's start, and of those after the piece, which become
            those before it.
        d_y: Points to the gradient of the first token's output.
    """
    k, v, q = made
    start, before = places
    d_start, back = backs
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    FIRST: tl.constexpr = PLAN.hidden if PLAN.mlp else N
    ROW: tl.constexpr = PLAN.columns
    READS: tl.constexpr = not NARROW and PLAN.read != "boundary"
    write_again(memory, made, exists, places, scratch, NARROW, PLAN)
    if READS and memory == 0:
        read_memory_back(made, exists, before, d_y, scratch, PLAN)
    if PLAN.mlp:
        SECOND: tl.constexpr = at.SECOND_SIMILAR
        keys, offset = at.matrix(scratch, at.KEYS, PLAN), second_layer(memory, NARROW, PLAN)
        move_back(keys, exists, offset, before, back, scratch, SECOND, at.SECOND, at.D_KEYS, N, FIRST, N, PLAN)
        carry_back(keys, exists, offset, before, back, scratch, N, FIRST, N, PLAN)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, PLAN)
            read_states_back(inner, exists, d_y, offset, back, scratch, N, FIRST, N, PLAN)
    offset = first_layer(memory, NARROW, PLAN)
    move_back(k, exists, offset, before, back, scratch, at.SIMILAR, at.VALUES, at.D_K, ROW, PLAN.dim, FIRST, PLAN)
    carry_back(k, exists, offset, before, back, scratch, ROW, PLAN.dim, FIRST, PLAN)
    if READS and memory == 0:
        gradient = d_y
        if PLAN.mlp:
            gradient = at.matrix(scratch, at.D_INNER, PLAN)
        read_states_back(q, exists, gradient, offset, back, scratch, ROW, PLAN.dim, FIRST, PLAN)
    if PLAN.mlp:
        write_mlp_back(k, v, exists, start[0], d_start, memory, scratch, NARROW, PLAN)
    else:
        write_linear_back(k, v, exists, start[0], d_start, memory, scratch, NARROW, PLAN)


@triton.jit
def tables_back(size, scratch, PLAN: tl.constexpr):
    """Return the gradients of `alpha` and `mu` `[C]` from those of tables and of the last of their weights."""
    rows, pushes = tl.arange(0, PLAN.rows), None
    retention = tl.load(at.row(scratch, at.ALPHA, PLAN))
    push_retention = retention
    if PLAN.momentum:
        pushes = scratch + at.MU * PLAN.rows
        push_retention = tl.load(at.row(scratch, at.MU, PLAN))
    tables = chunk_tables(scratch + at.ALPHA * PLAN.rows, pushes, rows, 1, rows, size, PLAN.precision)
    ends, last = tl.where(rows == size - 1, 1.0, 0.0), scratch + at.D_LAST * PLAN.rows
    kept, write = tl.load(at.table(scratch, at.D_KEPT, PLAN)), tl.load(at.table(scratch, at.D_WRITE, PLAN))
    read_kept = tl.load(at.table(scratch, at.D_READ_KEPT, PLAN))
    read_write = tl.load(at.table(scratch, at.D_READ_WRITE, PLAN))
    wrote, erase = tl.load(at.row(scratch, at.D_WROTE, PLAN)), tl.load(at.row(scratch, at.D_ERASED, PLAN))
    if not PLAN.momentum:  # writes and erases weigh the same
        kept, read_kept, erase = kept + write, read_kept + read_write, erase + wrote
    start, push = tl.load(at.row(scratch, at.D_START, PLAN)), tl.load(at.row(scratch, at.D_PUSHED, PLAN))
    before = (kept, start, write, push)
    kept, write = ends[:, None] * erase[None, :], ends[:, None] * wrote[None, :]
    after = (kept, ends * tl.load(last), write, ends * tl.load(last + 1))
    start, push = tl.load(at.row(scratch, at.D_READ_START, PLAN)), tl.load(at.row(scratch, at.D_READ_PUSHED, PLAN))
    if PLAN.read == "inclusive":
        after = (after[0] + read_kept, after[1] + start, after[2] + read_write, after[3] + push)
    else:
        before = (before[0] + read_kept, before[1] + start, before[2] + read_write, before[3] + push)
    link = ends[:, None] * tl.load(at.row(scratch, at.D_LINK, PLAN))[None, :]
    kept = ends * tl.load(last + 2)
    return gates_back(tables, before, after, link, kept, retention, push_retention, rows, PLAN.momentum, PLAN.precision)
