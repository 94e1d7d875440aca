"""The way back through `layers.py`, in its words. Gradients gather in scratch memory, and in place in those of weights.

The gradients of write values and of what was held lie one behind the other, too; `gradients_at` says where. Those of
keys are added to what is kept as `D_KEYS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import (
    add,
    add_outer,
    ask,
    ask_back,
    load_rows,
    multiply,
    outer,
    pairs,
    put,
)


@triton.jit
def gradients_at(scratch, VALUES: tl.constexpr, WIDTH: tl.constexpr, CONFIG: tl.constexpr):
    """Point to the gradients of write values, or of what was held, entry by entry."""
    return at.whole(scratch, VALUES - at.VALUES + at.D_VALUES, WIDTH, CONFIG)


@triton.jit
def read_back(q, keys, exists, gradient, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of what `read_layer` read to keys, and keep that of writes; return that of queries `[C, K]`."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    queries, d_found = load_rows(q, exists, K), load_rows(gradient, exists, N)
    similar = pairs(q, keys, exists, K, CONFIG)
    weights = tl.load(at.table(scratch, at.WRITE + CONFIG.reading, CONFIG))
    d_values = multiply(tl.trans(weights * similar), d_found, CONFIG)
    put(gradients_at(scratch, VALUES, N, CONFIG), d_values)
    d_weights = multiply(d_found, tl.trans(at.written(scratch, VALUES, N, CONFIG)), CONFIG)
    add(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG), d_weights * similar)
    d_similar = d_weights * weights
    if CONFIG.spec.erase:
        weights = tl.load(at.table(scratch, at.KEPT + CONFIG.reading, CONFIG))
        d_held = -multiply(tl.trans(weights * similar), d_found, CONFIG)
        put(gradients_at(scratch, VALUES + 1, N, CONFIG), d_held)
        d_weights = -multiply(d_found, tl.trans(at.written(scratch, VALUES + 1, N, CONFIG)), CONFIG)
        add(at.table(scratch, at.D_KEPT + CONFIG.reading, CONFIG), d_weights * similar)
        d_similar += d_weights * weights
    d_q = multiply(d_similar, load_rows(keys, exists, K), CONFIG)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), multiply(tl.trans(d_similar), queries, CONFIG))
    asked = ask_back(gradient, exists, before[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_START + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
    d_q += at.column(scratch, at.START + CONFIG.reading, CONFIG) * asked
    if CONFIG.momentum:
        asked = ask_back(gradient, exists, before[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_PUSHED + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
        d_q += at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG) * asked
    return d_q


@triton.jit
def read_states_back(q, exists, gradient, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add what `read_layer` asked of the first state and momentum to their gradients."""
    d_found = load_rows(gradient, exists, LAYER.outputs)
    asked = at.column(scratch, at.START + CONFIG.reading, CONFIG) * d_found
    add_outer(back[0], q, exists, asked, LAYER, CONFIG)
    if CONFIG.momentum:
        asked = at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG) * d_found
        add_outer(back[1], q, exists, asked, LAYER, CONFIG)


@triton.jit
def hold_back(keys, exists, d_held, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of what was held, times the learning rate, through `hold`; keep what was solved for."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    rate, similar = at.column(scratch, at.RATE, CONFIG), tl.load(at.table(scratch, LAYER.similar, CONFIG))
    solved = multiply(tl.trans(tl.load(at.table(scratch, LAYER.similar + 1, CONFIG))), rate * d_held, CONFIG)
    put(at.whole(scratch, at.SOLVED, N, CONFIG), solved)
    held, weights = tl.load(at.whole(scratch, VALUES + 1, N, CONFIG)), tl.load(at.table(scratch, at.KEPT, CONFIG))
    d_held -= multiply(tl.trans(weights * similar), solved, CONFIG)
    at.add_row(scratch, at.D_RATE, tl.sum(d_held * held, 1), CONFIG)
    d_weights = -multiply(solved, tl.trans(rate * held), CONFIG)
    add(at.table(scratch, at.D_KEPT, CONFIG), d_weights * similar)
    d_similar = d_weights * weights
    weights = tl.load(at.table(scratch, at.WRITE, CONFIG))
    add(gradients_at(scratch, VALUES, N, CONFIG), multiply(tl.trans(weights * similar), solved, CONFIG))
    d_weights = multiply(solved, tl.trans(at.written(scratch, VALUES, N, CONFIG)), CONFIG)
    add(at.table(scratch, at.D_WRITE, CONFIG), d_weights * similar)
    d_similar += d_weights * weights
    own = load_rows(keys, exists, K)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), multiply(d_similar + tl.trans(d_similar), own, CONFIG))
    asked = ask_back(at.matrix(scratch, at.SOLVED, CONFIG), exists, before[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_START, tl.sum(asked * own, 1), CONFIG)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), at.column(scratch, at.START, CONFIG) * asked)
    if CONFIG.momentum:
        asked = ask_back(at.matrix(scratch, at.SOLVED, CONFIG), exists, before[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_PUSHED, tl.sum(asked * load_rows(keys, exists, K), 1), CONFIG)
        add(at.whole(scratch, LAYER.d_keys, K, CONFIG), at.column(scratch, at.PUSHED, CONFIG) * asked)


@triton.jit
def move_back(keys, exists, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients of a layer's state and momentum after the piece, `back`, to its keys and write values."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    temporary, gradient = at.matrix(scratch, at.TEMPORARY, CONFIG), gradients_at(scratch, VALUES, N, CONFIG)
    if CONFIG.momentum:
        weights, written = at.column(scratch, at.LINK, CONFIG), at.written(scratch, VALUES, N, CONFIG)
        put(at.whole(scratch, at.TEMPORARY, N, CONFIG), weights * written)
        pushing = ask(keys, exists, back[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_LINK, tl.sum(pushing * written, 1), CONFIG)
        add(gradient, weights * pushing)
        d_keys = ask_back(temporary, exists, back[1], LAYER, CONFIG)
        add(at.whole(scratch, LAYER.d_keys, K, CONFIG), d_keys)
    weights, written = at.column(scratch, at.WROTE, CONFIG), at.written(scratch, VALUES, N, CONFIG)
    put(at.whole(scratch, at.TEMPORARY, N, CONFIG), weights * written)
    entering = ask(keys, exists, back[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_WROTE, tl.sum(entering * written, 1), CONFIG)
    add(gradient, weights * entering)
    if CONFIG.spec.erase:
        weights, erased = at.column(scratch, at.ERASED, CONFIG), at.written(scratch, VALUES + 1, N, CONFIG)
        add(at.whole(scratch, at.TEMPORARY, N, CONFIG), -weights * erased)
        at.add_row(scratch, at.D_ERASED, -tl.sum(entering * erased, 1), CONFIG)
        d_held = tl.load(gradients_at(scratch, VALUES + 1, N, CONFIG)) - weights * entering
        hold_back(keys, exists, d_held, before, scratch, LAYER, CONFIG)
    d_keys = ask_back(temporary, exists, back[0], LAYER, CONFIG)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), d_keys)
    d_written = tl.load(gradient)
    at.add_row(scratch, at.D_RATE, tl.sum(d_written * tl.load(at.whole(scratch, VALUES, N, CONFIG)), 1), CONFIG)
    put(gradient, at.column(scratch, at.RATE, CONFIG) * d_written)


@triton.jit
def carry_back(keys, exists, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Turn the gradients of a layer's state and momentum after the piece into those before it. After `move_back`."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    last, d_last = scratch + at.LAST * CONFIG.rows, scratch + at.D_LAST * CONFIG.rows
    d_first, d_pushed, d_momentum_decay = 0.0, 0.0, 0.0
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = k[:, None] * LAYER.row + tl.arange(0, N)[None, :]
        d_state = tl.load(back[0] + here)
        d_first += tl.sum(d_state * tl.load(before[0] + here))
        d_before = tl.load(last) * d_state
        if CONFIG.spec.erase:
            solved = tl.load(at.whole(scratch, at.SOLVED, N, CONFIG))
            d_before += outer(keys, exists, at.column(scratch, at.START, CONFIG) * solved, k, K, CONFIG)
        if CONFIG.momentum:
            d_momentum, momentum = tl.load(back[1] + here), tl.load(before[1] + here)
            d_pushed += tl.sum(d_state * momentum)
            d_momentum_decay += tl.sum(d_momentum * momentum)
            d_momentum = tl.load(last + 2) * d_momentum + tl.load(last + 1) * d_state
            if CONFIG.spec.erase:
                d_momentum += outer(keys, exists, at.column(scratch, at.PUSHED, CONFIG) * solved, k, K, CONFIG)
            put(back[1] + here, d_momentum)
        put(back[0] + here, d_before)
    add(d_last, d_first)
    if CONFIG.momentum:
        add(d_last + 1, d_pushed)
        add(d_last + 2, d_momentum_decay)
