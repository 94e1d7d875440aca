"""How a piece of a chunk moves one linear layer, and what is read of it on the way.

Everything is as in the page above, with the learning rate of a write beside its value instead of in the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import reading_tables, unit_inverse
from hopescale.ops.self_modifying.triton.matrices import multiply, outer, pairs, put, times


@triton.jit
def open_keys(keys, exists, piece, K: tl.constexpr, PLAN: tl.constexpr):
    """Return the products of keys `[C, K]` with one another, and how erases spread over the piece, `[C, C]` each."""
    kept, rate = piece[1][0], piece[0][0]
    similar, inverse = kept, kept
    if PLAN.erase:
        similar = pairs(keys, keys, exists, K, PLAN)
        lower = kept * similar * rate[None, :]
        inverse = unit_inverse(lower, tl.arange(0, PLAN.rows), PLAN.doublings, PLAN.precision)
    return similar, inverse


@triton.jit
def hold(
    keys, exists, piece, of_keys, values, offset, before, ROW, K: tl.constexpr, N: tl.constexpr, PLAN: tl.constexpr
):
    """Return what a layer held under each key just before the write, `[C, N]`; unused where nothing is erased.

    Args:
        keys: Keys `[C, K]`.
        piece: Result of `open_piece`.
        of_keys: Result of `open_keys`.
        values: Write values `[C, N]`.
        offset: Where the layer begins in a packed set of weights; its rows are `ROW` apart.
        before: Point to packed weights and momentum before the piece.
    """
    held = values
    if PLAN.erase:
        kept, start, chain, from_start, write, push = piece[1]
        held = start[:, None] * times(keys, exists, before[0] + offset, ROW, 1, K, N, PLAN)
        held += multiply(write * of_keys[0], piece[0][0][:, None] * values, PLAN)
        if PLAN.momentum:
            held += push[:, None] * times(keys, exists, before[1] + offset, ROW, 1, K, N, PLAN)
        held = multiply(of_keys[1], held, PLAN)
    return held


@triton.jit
def move(
    keys, exists, piece, values, held, offset, before, after, ROW, K: tl.constexpr, N: tl.constexpr, PLAN: tl.constexpr
):
    """Store a layer's state and momentum where `after` points to, maybe `before`. The rest is as in `hold`."""
    erase, first, wrote, pushed, link, push_kept = piece[2]
    written = piece[0][0][:, None] * values
    entered, pushes = wrote[:, None] * written, link[:, None] * written
    if PLAN.erase:
        entered -= (erase * piece[0][0])[:, None] * held
    BLOCK: tl.constexpr = PLAN.block if PLAN.block < K else K
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = offset + k[:, None] * ROW + tl.arange(0, N)[None, :]
        state = first * tl.load(before[0] + here) + outer(keys, exists, entered, k, K, PLAN)
        if PLAN.momentum:
            momentum = tl.load(before[1] + here)
            state += pushed * momentum
            put(after[1] + here, push_kept * momentum + outer(keys, exists, pushes, k, K, PLAN))
        put(after[0] + here, state)


@triton.jit
def read_layer(
    q, keys, exists, piece, values, held, offset, before, ROW, K: tl.constexpr, N: tl.constexpr, PLAN: tl.constexpr
):
    """Read a layer with one query `[C, K]` per token: `[C, N]`. The rest is as in `hold`."""
    rate, retention, _ = piece[0]
    kept, start, write, push = reading_tables(piece[1], retention, tl.arange(0, PLAN.rows), PLAN.read, PLAN.momentum)
    similar = pairs(q, keys, exists, K, PLAN)
    found = start[:, None] * times(q, exists, before[0] + offset, ROW, 1, K, N, PLAN)
    found += multiply(write * similar, rate[:, None] * values, PLAN)
    if PLAN.erase:
        found -= multiply(kept * similar, rate[:, None] * held, PLAN)
    if PLAN.momentum:
        found += push[:, None] * times(q, exists, before[1] + offset, ROW, 1, K, N, PLAN)
    return found
