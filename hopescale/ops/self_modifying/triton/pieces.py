"""What both directions do with a piece of a chunk: gates and tables, and how it moves a memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import decay_weights, last_weights, reading_tables
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
def place_piece(n, p, tokens, chunk_size, CONFIG: tl.constexpr):
    """Find piece `p` of chunk `n`: its first token in the sequence, and how many there are."""
    first = n * chunk_size + p * CONFIG.rows
    return first, tl.minimum(CONFIG.rows, tl.minimum(chunk_size - p * CONFIG.rows, tokens - first))


@triton.jit
def count_pieces(n, tokens, chunk_size, CONFIG: tl.constexpr):
    """Count the pieces of chunk `n`."""
    return tl.cdiv(tl.minimum(chunk_size, tokens - n * chunk_size), CONFIG.rows)


@triton.jit
def keep_tables(retention, size, scratch, CONFIG: tl.constexpr):
    """Keep the tables of a piece, and what they say of its end. Returns `decay_weights`."""
    rows, pushes = tl.arange(0, CONFIG.rows), None
    if CONFIG.momentum:
        pushes = scratch + at.MU * CONFIG.rows
    decay = decay_weights(scratch + at.ALPHA * CONFIG.rows, pushes, rows, 1, rows, size, CONFIG.precision)
    kept, start, chain, from_start, write, push = decay
    tl.store(at.table(scratch, at.KEPT, CONFIG), kept)
    tl.store(at.table(scratch, at.WRITE, CONFIG), write)
    tl.store(at.row(scratch, at.START, CONFIG), start)
    tl.store(at.row(scratch, at.PUSHED, CONFIG), push)
    erase, first, wrote, pushed, link, momentum_decay = last_weights(decay, retention, rows, size, CONFIG.momentum)
    tl.store(at.row(scratch, at.ERASED, CONFIG), erase)
    tl.store(at.row(scratch, at.WROTE, CONFIG), wrote)
    tl.store(at.row(scratch, at.LINK, CONFIG), link)
    last = scratch + at.LAST * CONFIG.rows
    tl.store(last, first)
    tl.store(last + 1, pushed)
    tl.store(last + 2, momentum_decay)
    kept, start, write, push = reading_tables(decay, retention, rows, CONFIG.read, CONFIG.momentum)
    tl.store(at.table(scratch, at.READ_KEPT, CONFIG), kept)
    tl.store(at.table(scratch, at.READ_WRITE, CONFIG), write)
    tl.store(at.row(scratch, at.READ_START, CONFIG), start)
    tl.store(at.row(scratch, at.READ_PUSHED, CONFIG), push)
    tl.debug_barrier()


@triton.jit
def open_piece(logits, streams, exists, size, boundary, scratch, CONFIG: tl.constexpr):
    """Make keys, values, queries, gates and tables of a piece; return where the first three lie.

    Args:
        logits: Point to the first token's logits of the gates.
        streams: Point to its inputs of keys, values and queries.
        size: Number of tokens.
        boundary: Points to packed weights at the chunk's start.
    """
    inputs = make_tokens(streams, exists, boundary, scratch, CONFIG)
    keep_tables(make_gates(logits, streams[0], exists, boundary, scratch, CONFIG), size, scratch, CONFIG)
    open_keys(inputs[0], exists, scratch, at.SIMILAR, CONFIG.dim, CONFIG)
    return inputs


@triton.jit
def pass_memory(
    memory, inputs, exists, slots, out, scratch, READ: tl.constexpr, NARROW: tl.constexpr, CONFIG: tl.constexpr
):
    """Move one memory over a piece; with `READ` read the first vector memory on the way.

    Args:
        inputs: Result of `open_piece`.
        slots: Point to packed weights and momentum at the chunk's start, before the piece and after it.
        out: Point to the first token's output and to the norm of its error.
    """
    k, v, q = inputs
    start, before, after = slots
    y, surprise = out
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    FIRST: tl.constexpr = CONFIG.hidden if CONFIG.mlp else N
    READS: tl.constexpr = READ and not NARROW and CONFIG.read != "boundary"
    ROW: tl.constexpr = CONFIG.columns
    offset = first_layer(memory, NARROW, CONFIG)
    error = write(k, v, exists, start[0], memory, scratch, NARROW, False, CONFIG)
    if READ and not NARROW:
        tl.store(surprise + 3 * tl.arange(0, CONFIG.rows), error, mask=exists & (memory == 0))
    hold(k, exists, offset, before, scratch, at.SIMILAR, at.VALUES, ROW, CONFIG.dim, FIRST, CONFIG)
    if READS and memory == 0:
        found = read_layer(q, k, exists, offset, before, scratch, at.VALUES, ROW, CONFIG.dim, FIRST, CONFIG)
        if CONFIG.mlp:
            put(at.whole(scratch, at.INNER, FIRST, CONFIG), found * tl.sigmoid(found))
        else:
            tl.store(tile(y, CONFIG.rows, N), found, mask=exists[:, None])
    move(k, exists, offset, before, after, scratch, at.VALUES, ROW, CONFIG.dim, FIRST, CONFIG)
    if CONFIG.mlp:
        offset, keys = second_layer(memory, NARROW, CONFIG), at.matrix(scratch, at.KEYS, CONFIG)
        open_keys(keys, exists, scratch, at.SECOND_SIMILAR, FIRST, CONFIG)
        hold(keys, exists, offset, before, scratch, at.SECOND_SIMILAR, at.SECOND, N, FIRST, N, CONFIG)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, CONFIG)
            found = read_layer(inner, keys, exists, offset, before, scratch, at.SECOND, N, FIRST, N, CONFIG)
            tl.store(tile(y, CONFIG.rows, N), load_rows(q, exists, N) + found, mask=exists[:, None])
        move(keys, exists, offset, before, after, scratch, at.SECOND, N, FIRST, N, CONFIG)


@triton.jit
def pass_memories(inputs, exists, slots, out, scratch, READ: tl.constexpr, CONFIG: tl.constexpr):
    """Move all memories over a piece. Arguments as in `pass_memory`."""
    if CONFIG.gate_memories:
        for memory in range(CONFIG.gate_memories):
            pass_memory(memory, inputs, exists, slots, out, scratch, READ, True, CONFIG)
    for memory in range(CONFIG.vector_memories):
        pass_memory(memory, inputs, exists, slots, out, scratch, READ, False, CONFIG)


@triton.jit
def packed(states, momenta, slot, CONFIG: tl.constexpr):
    """Point to a packed set of weights and to its momentum."""
    state = states + slot * CONFIG.size
    momentum = state
    if CONFIG.momentum:
        momentum = momenta + slot * CONFIG.size
    return state, momentum
