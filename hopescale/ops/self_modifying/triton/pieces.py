"""What both directions do with a piece of a chunk: gates and tables, and how it moves a memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import chunk_tables, last_weights
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, move, open_keys, read_layer
from hopescale.ops.self_modifying.triton.matrices import load_rows, put, tile
from hopescale.ops.self_modifying.triton.memories import first_layer, make_gates, second_layer, write


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
def open_piece(logits, stream, exists, size, boundary, scratch, PLAN: tl.constexpr):
    """Return gates `eta`, `alpha` and `mu` of a piece, the results of `chunk_tables`, and those of `last_weights`.

    Args:
        logits: Point to the first token's logits of the gates.
        stream: Points to the inputs of keys, at which narrow memories are asked.
        size: Number of tokens.
        boundary: Points to packed weights at the chunk's start.
    """
    rows = tl.arange(0, PLAN.rows)
    gates = make_gates(logits, stream, exists, boundary, scratch, PLAN)
    retention, pushes = scratch + at.ALPHA * PLAN.rows, None
    if PLAN.momentum:
        pushes = scratch + at.MU * PLAN.rows
    tables = chunk_tables(retention, pushes, rows, 1, rows, size, PLAN.precision)
    return gates, tables, last_weights(tables, gates[1], rows, size, PLAN.momentum)


@triton.jit
def pass_memory(
    memory,
    made,
    exists,
    piece,
    of_keys,
    places,
    out,
    scratch,
    READ: tl.constexpr,
    NARROW: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Move one memory over a piece; with `READ` read the first wide one on the way.

    Args:
        made: Point to keys, values and queries.
        piece: Result of `open_piece`.
        of_keys: Result of `open_keys` for the keys.
        places: Point to packed weights and momentum at the chunk's start, before the piece and after it.
        out: Point to the first token's output and to the norm of its error.
    """
    k, v, q = made
    start, before, after = places
    y, surprise = out
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    FIRST: tl.constexpr = PLAN.hidden if PLAN.mlp else N
    READS: tl.constexpr = READ and not NARROW and PLAN.read != "boundary"
    offset = first_layer(memory, NARROW, PLAN)
    values, second_values, error = write(k, v, exists, piece, start[0], memory, scratch, NARROW, False, PLAN)
    held = hold(k, exists, piece, of_keys, values, offset, before, PLAN.columns, PLAN.dim, FIRST, PLAN)
    if READ and not NARROW:
        tl.store(surprise + 3 * tl.arange(0, PLAN.rows), error, mask=exists & (memory == 0))
    if READS and memory == 0:
        found = read_layer(q, k, exists, piece, values, held, offset, before, PLAN.columns, PLAN.dim, FIRST, PLAN)
        if PLAN.mlp:
            put(at.whole(scratch, at.INNER, FIRST, PLAN), found * tl.sigmoid(found))
        else:
            tl.store(tile(y, PLAN.rows, N), found, mask=exists[:, None])
    move(k, exists, piece, values, held, offset, before, after, PLAN.columns, PLAN.dim, FIRST, PLAN)
    if PLAN.mlp:
        offset, keys = second_layer(memory, NARROW, PLAN), at.matrix(scratch, at.KEYS, PLAN)
        of_keys = open_keys(keys, exists, piece, FIRST, PLAN)
        held = hold(keys, exists, piece, of_keys, second_values, offset, before, N, FIRST, N, PLAN)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, PLAN)
            found = read_layer(inner, keys, exists, piece, second_values, held, offset, before, N, FIRST, N, PLAN)
            tl.store(tile(y, PLAN.rows, N), load_rows(q, exists, N) + found, mask=exists[:, None])
        move(keys, exists, piece, second_values, held, offset, before, after, N, FIRST, N, PLAN)


@triton.jit
def pass_memories(made, exists, piece, places, out, scratch, READ: tl.constexpr, PLAN: tl.constexpr):
    """Move all memories over a piece. Arguments as in `pass_memory`."""
    of_keys = open_keys(made[0], exists, piece, PLAN.dim, PLAN)
    if PLAN.narrow:
        for memory in range(PLAN.narrow):
            pass_memory(memory, made, exists, piece, of_keys, places, out, scratch, READ, True, PLAN)
    for memory in range(PLAN.wide):
        pass_memory(memory, made, exists, piece, of_keys, places, out, scratch, READ, False, PLAN)


@triton.jit
def packed(states, momenta, place, PLAN: tl.constexpr):
    """Point to a packed set of weights and to its momentum."""
    state = states + place * PLAN.size
    momentum = state
    if PLAN.momentum:
        momentum = momenta + place * PLAN.size
    return state, momentum
