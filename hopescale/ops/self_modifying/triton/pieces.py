"""What both directions do with a piece of a chunk: gates and tables, and how it moves a memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import chunk_tables, last_weights, reading_tables
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, move, open_keys, read_layer
from hopescale.ops.self_modifying.triton.matrices import load_rows, put, tile
from hopescale.ops.self_modifying.triton.memories import (
    first_layer,
    make_gates,
    make_tokens,
    second_layer,
    write,
)


@triton.jit
def place_piece(n, p, tokens, chunk_size, PLAN: tl.constexpr):
    """Find piece `p` of chunk `n`: its first token in the sequence, and how many there are."""
    first = n * chunk_size + p * PLAN.rows
    return first, tl.minimum(PLAN.rows, tl.minimum(chunk_size - p * PLAN.rows, tokens - first))


@triton.jit
def count_pieces(n, tokens, chunk_size, PLAN: tl.constexpr):
    """Count the pieces of chunk `n`."""
    return tl.cdiv(tl.minimum(chunk_size, tokens - n * chunk_size), PLAN.rows)


@triton.jit
def keep_tables(retention, size, scratch, PLAN: tl.constexpr):
    """Keep the tables of a piece, and what they say of its end. Returns `chunk_tables`."""
    rows, pushes = tl.arange(0, PLAN.rows), None
    if PLAN.momentum:
        pushes = scratch + at.MU * PLAN.rows
    tables = chunk_tables(scratch + at.ALPHA * PLAN.rows, pushes, rows, 1, rows, size, PLAN.precision)
    kept, start, chain, from_start, write, push = tables
    tl.store(at.table(scratch, at.KEPT, PLAN), kept)
    tl.store(at.table(scratch, at.WRITE, PLAN), write)
    tl.store(at.row(scratch, at.START, PLAN), start)
    tl.store(at.row(scratch, at.PUSHED, PLAN), push)
    erase, first, wrote, pushed, link, push_kept = last_weights(tables, retention, rows, size, PLAN.momentum)
    tl.store(at.row(scratch, at.ERASED, PLAN), erase)
    tl.store(at.row(scratch, at.WROTE, PLAN), wrote)
    tl.store(at.row(scratch, at.LINK, PLAN), link)
    last = scratch + at.LAST * PLAN.rows
    tl.store(last, first)
    tl.store(last + 1, pushed)
    tl.store(last + 2, push_kept)
    kept, start, write, push = reading_tables(tables, retention, rows, PLAN.read, PLAN.momentum)
    tl.store(at.table(scratch, at.READ_KEPT, PLAN), kept)
    tl.store(at.table(scratch, at.READ_WRITE, PLAN), write)
    tl.store(at.row(scratch, at.READ_START, PLAN), start)
    tl.store(at.row(scratch, at.READ_PUSHED, PLAN), push)
    tl.debug_barrier()


@triton.jit
def open_piece(logits, streams, exists, size, boundary, scratch, PLAN: tl.constexpr):
    """Make keys, values, queries, gates and tables of a piece; return where the first three lie.

    Args:
        logits: Point to the first token's logits of the gates.
        streams: Point to its inputs of keys, values and queries.
        size: Number of tokens.
        boundary: Points to packed weights at the chunk's start.
    """
    made = make_tokens(streams, exists, boundary, scratch, PLAN)
    keep_tables(make_gates(logits, streams[0], exists, boundary, scratch, PLAN), size, scratch, PLAN)
    open_keys(made[0], exists, scratch, at.SIMILAR, PLAN.dim, PLAN)
    return made


@triton.jit
def pass_memory(
    memory, made, exists, places, out, scratch, READ: tl.constexpr, NARROW: tl.constexpr, PLAN: tl.constexpr
):
    """Move one memory over a piece; with `READ` read the first wide one on the way.

    Args:
        made: Result of `open_piece`.
        places: Point to packed weights and momentum at the chunk's start, before the piece and after it.
        out: Point to the first token's output and to the norm of its error.
    """
    k, v, q = made
    start, before, after = places
    y, surprise = out
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    FIRST: tl.constexpr = PLAN.hidden if PLAN.mlp else N
    READS: tl.constexpr = READ and not NARROW and PLAN.read != "boundary"
    ROW: tl.constexpr = PLAN.columns
    offset = first_layer(memory, NARROW, PLAN)
    error = write(k, v, exists, start[0], memory, scratch, NARROW, False, PLAN)
    if READ and not NARROW:
        tl.store(surprise + 3 * tl.arange(0, PLAN.rows), error, mask=exists & (memory == 0))
    hold(k, exists, offset, before, scratch, at.SIMILAR, at.VALUES, ROW, PLAN.dim, FIRST, PLAN)
    if READS and memory == 0:
        found = read_layer(q, k, exists, offset, before, scratch, at.VALUES, ROW, PLAN.dim, FIRST, PLAN)
        if PLAN.mlp:
            put(at.whole(scratch, at.INNER, FIRST, PLAN), found * tl.sigmoid(found))
        else:
            tl.store(tile(y, PLAN.rows, N), found, mask=exists[:, None])
    move(k, exists, offset, before, after, scratch, at.VALUES, ROW, PLAN.dim, FIRST, PLAN)
    if PLAN.mlp:
        offset, keys = second_layer(memory, NARROW, PLAN), at.matrix(scratch, at.KEYS, PLAN)
        open_keys(keys, exists, scratch, at.SECOND_SIMILAR, FIRST, PLAN)
        hold(keys, exists, offset, before, scratch, at.SECOND_SIMILAR, at.SECOND, N, FIRST, N, PLAN)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, PLAN)
            found = read_layer(inner, keys, exists, offset, before, scratch, at.SECOND, N, FIRST, N, PLAN)
            tl.store(tile(y, PLAN.rows, N), load_rows(q, exists, N) + found, mask=exists[:, None])
        move(keys, exists, offset, before, after, scratch, at.SECOND, N, FIRST, N, PLAN)


@triton.jit
def pass_memories(made, exists, places, out, scratch, READ: tl.constexpr, PLAN: tl.constexpr):
    """Move all memories over a piece. Arguments as in `pass_memory`."""
    if PLAN.narrow:
        for memory in range(PLAN.narrow):
            pass_memory(memory, made, exists, places, out, scratch, READ, True, PLAN)
    for memory in range(PLAN.wide):
        pass_memory(memory, made, exists, places, out, scratch, READ, False, PLAN)


@triton.jit
def packed(states, momenta, place, PLAN: tl.constexpr):
    """Point to a packed set of weights and to its momentum."""
    state = states + place * PLAN.size
    momentum = state
    if PLAN.momentum:
        momentum = momenta + place * PLAN.size
    return state, momentum
