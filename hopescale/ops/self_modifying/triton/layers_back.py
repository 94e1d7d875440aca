"""The way back through `layers.py`. Gradients gather in scratch memory, and in place in those of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import reading_tables
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, add_outer, load_rows, multiply, outer, pairs, put, times


@triton.jit
def read_back(
    q,
    keys,
    exists,
    piece,
    gradient,
    offset,
    before,
    scratch,
    VALUES: tl.constexpr,
    ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Move the gradient of what `read_layer` read to queries and keys, `[C, K]` each, and keep that of the writes.

    Args:
        gradient: Points to it, `[C, N]`.
        VALUES: Where write values are kept; what was held follows, and `D_WRITTEN` and `D_ERASED` in the same order.
    """
    reading = reading_tables(piece[1], piece[0][1], tl.arange(0, PLAN.rows), PLAN.read, PLAN.momentum)
    kept, start, write, push = reading
    rate = piece[0][0][:, None]
    queries, similar, d_found = load_rows(q, exists, K), pairs(q, keys, exists, K, PLAN), load_rows(gradient, exists, N)
    asked = times(gradient, exists, before[0] + offset, 1, ROW, N, K, PLAN)
    at.add_row(scratch, at.READ_START, tl.sum(asked * queries, 1), PLAN)
    d_q = start[:, None] * asked
    if PLAN.momentum:
        asked = times(gradient, exists, before[1] + offset, 1, ROW, N, K, PLAN)
        at.add_row(scratch, at.READ_PUSH, tl.sum(asked * queries, 1), PLAN)
        d_q += push[:, None] * asked
    written = rate * tl.load(at.whole(scratch, VALUES, N, PLAN))
    d_write = multiply(d_found, tl.trans(written), PLAN)
    add(at.table(scratch, at.READ_WRITE, PLAN), d_write * similar)
    put(
        at.whole(scratch, VALUES - at.VALUES + at.D_WRITTEN, N, PLAN),
        multiply(tl.trans(write * similar), d_found, PLAN),
    )
    d_similar = d_write * write
    if PLAN.erase:
        erased = rate * tl.load(at.whole(scratch, VALUES + 1, N, PLAN))
        d_kept = -multiply(d_found, tl.trans(erased), PLAN)
        add(at.table(scratch, at.READ_KEPT, PLAN), d_kept * similar)
        put(
            at.whole(scratch, VALUES - at.VALUES + at.D_ERASED, N, PLAN),
            -multiply(tl.trans(kept * similar), d_found, PLAN),
        )
        d_similar += d_kept * kept
    d_q += multiply(d_similar, load_rows(keys, exists, K), PLAN)
    return d_q, multiply(tl.trans(d_similar), queries, PLAN)


@triton.jit
def read_states_back(
    q,
    exists,
    piece,
    gradient,
    offset,
    back,
    ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Add what `read_layer` asked of the first state and momentum to their gradients. Arguments as in `read_back`."""
    reading = reading_tables(piece[1], piece[0][1], tl.arange(0, PLAN.rows), PLAN.read, PLAN.momentum)
    d_found = load_rows(gradient, exists, N)
    add_outer(back[0] + offset, ROW, q, exists, reading[1][:, None] * d_found, K, N, PLAN)
    if PLAN.momentum:
        add_outer(back[1] + offset, ROW, q, exists, reading[3][:, None] * d_found, K, N, PLAN)


@triton.jit
def solve_back(
    keys,
    exists,
    piece,
    of_keys,
    own,
    d_written,
    d_erased,
    offset,
    before,
    scratch,
    VALUES: tl.constexpr,
    ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Move gradients through `hold`, and keep that of what was solved for.

    Args:
        own: Write values `[C, N]`.
        d_written: Gradient of writes, all but what comes from here.
        d_erased: Gradient of erases, likewise.

    Returns:
        The gradients of writes and of keys.
    """
    rate, found = piece[0][0][:, None], tl.load(at.whole(scratch, VALUES + 1, N, PLAN))
    kept, start, chain, from_start, write, push = piece[1]
    similar, inverse = of_keys
    solved = multiply(tl.trans(inverse), rate * d_erased, PLAN)
    put(at.whole(scratch, at.SOLVED, N, PLAN), solved)
    d_erased -= multiply(tl.trans(kept * similar), solved, PLAN)
    at.add_row(scratch, at.D_RATE, tl.sum(d_erased * found, 1), PLAN)
    d_written += multiply(tl.trans(write * similar), solved, PLAN)
    d_kept = -multiply(solved, tl.trans(rate * found), PLAN)
    add(at.table(scratch, at.D_KEPT, PLAN), d_kept * similar)
    d_write = multiply(solved, tl.trans(rate * own), PLAN)
    add(at.table(scratch, at.D_WRITE, PLAN), d_write * similar)
    d_similar = d_kept * kept + d_write * write
    own_keys = load_rows(keys, exists, K)
    d_keys = multiply(d_similar + tl.trans(d_similar), own_keys, PLAN)
    asked = times(at.matrix(scratch, at.SOLVED, PLAN), exists, before[0] + offset, 1, ROW, N, K, PLAN)
    at.add_row(scratch, at.D_START, tl.sum(asked * own_keys, 1), PLAN)
    d_keys += start[:, None] * asked
    if PLAN.momentum:
        asked = times(at.matrix(scratch, at.SOLVED, PLAN), exists, before[1] + offset, 1, ROW, N, K, PLAN)
        at.add_row(scratch, at.D_PUSH, tl.sum(asked * own_keys, 1), PLAN)
        d_keys += push[:, None] * asked
    return d_written, d_keys


@triton.jit
def move_back(
    keys,
    exists,
    piece,
    of_keys,
    offset,
    before,
    back,
    scratch,
    VALUES: tl.constexpr,
    ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Move gradients of a layer's state and momentum after the piece to its keys, and keep those of its write values.

    Args:
        back: Point to packed gradients of weights and momentum after the piece.
        VALUES: As in `read_back`; gradients of values take the place of those of writes.

    Returns:
        The gradient of keys `[C, K]`.
    """
    rate = piece[0][0][:, None]
    erase, first, wrote, pushed, link, push_kept = piece[2]
    own = tl.load(at.whole(scratch, VALUES, N, PLAN))
    writes = at.whole(scratch, VALUES - at.VALUES + at.D_WRITTEN, N, PLAN)
    temporary = at.matrix(scratch, at.TEMPORARY, PLAN)
    entering = times(keys, exists, back[0] + offset, ROW, 1, K, N, PLAN)
    at.add_row(scratch, at.D_WROTE, tl.sum(entering * rate * own, 1), PLAN)
    d_written, d_erased = tl.load(writes) + wrote[:, None] * entering, entering
    entered = wrote[:, None] * rate * own
    if PLAN.erase:
        erased = rate * tl.load(at.whole(scratch, VALUES + 1, N, PLAN))
        at.add_row(scratch, at.D_ERASE, -tl.sum(entering * erased, 1), PLAN)
        d_erased = tl.load(at.whole(scratch, VALUES - at.VALUES + at.D_ERASED, N, PLAN)) - erase[:, None] * entering
        entered -= erase[:, None] * erased
    put(at.whole(scratch, at.TEMPORARY, N, PLAN), entered)
    d_keys = times(temporary, exists, back[0] + offset, 1, ROW, N, K, PLAN)
    if PLAN.momentum:
        pushing = times(keys, exists, back[1] + offset, ROW, 1, K, N, PLAN)
        at.add_row(scratch, at.D_LINK, tl.sum(pushing * rate * own, 1), PLAN)
        d_written += link[:, None] * pushing
        put(at.whole(scratch, at.TEMPORARY, N, PLAN), link[:, None] * rate * own)
        d_keys += times(temporary, exists, back[1] + offset, 1, ROW, N, K, PLAN)
    if PLAN.erase:
        d_written, more = solve_back(
            keys, exists, piece, of_keys, own, d_written, d_erased, offset, before, scratch, VALUES, ROW, K, N, PLAN
        )
        d_keys += more
    at.add_row(scratch, at.D_RATE, tl.sum(d_written * own, 1), PLAN)
    put(writes, rate * d_written)
    return d_keys


@triton.jit
def carry_back(
    keys,
    exists,
    piece,
    offset,
    before,
    back,
    scratch,
    ROW: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Turn the gradients of a layer's state and momentum after the piece into those before it. After `move_back`."""
    kept, start, chain, from_start, write, push = piece[1]
    erase, first, wrote, pushed, link, push_kept = piece[2]
    d_first, d_pushed, d_push_kept = 0.0, 0.0, 0.0
    solved = start
    if PLAN.erase:
        solved = tl.load(at.whole(scratch, at.SOLVED, N, PLAN))
    BLOCK: tl.constexpr = PLAN.block if PLAN.block < K else K
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = offset + k[:, None] * ROW + tl.arange(0, N)[None, :]
        d_state, state = tl.load(back[0] + here), tl.load(before[0] + here)
        d_first += tl.sum(d_state * state)
        d_before = first * d_state
        if PLAN.erase:
            d_before += outer(keys, exists, start[:, None] * solved, k, K, PLAN)
        if PLAN.momentum:
            d_momentum, momentum = tl.load(back[1] + here), tl.load(before[1] + here)
            d_pushed += tl.sum(d_state * momentum)
            d_push_kept += tl.sum(d_momentum * momentum)
            d_momentum = push_kept * d_momentum + pushed * d_state
            if PLAN.erase:
                d_momentum += outer(keys, exists, push[:, None] * solved, k, K, PLAN)
            put(back[1] + here, d_momentum)
        put(back[0] + here, d_before)
    last = scratch + at.D_LAST * PLAN.rows
    add(last, d_first)
    if PLAN.momentum:
        add(last + 1, d_pushed)
        add(last + 2, d_push_kept)
