"""The way back through `layers.py`, in its words. Gradients gather in scratch memory, and in place in those of weights.

`layer` points to the matrices of a layer, as `scratch.of_layer` says. What is written and held, and gradients of that,
lie one behind the other; `gradients_at` says where. What first layers say of keys, which they share, gathers over all
of them before it is moved to the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import entered
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
def gradients_at(scratch, BEHIND: tl.constexpr, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Point to the gradients of what is written, or of what was held, entry by entry."""
    return at.whole(scratch, LAYER.d_values + BEHIND, LAYER.outputs, CONFIG)


@triton.jit
def read_back(q, keys, exists, layer, gradient, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of what `read_layer` read to keys, and keep that of writes; return that of queries `[C, K]`."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    d_found = load_rows(gradient, exists, N)
    similar = pairs(q, keys, exists, K, CONFIG)
    weights = tl.load(at.table(scratch, at.WRITE + CONFIG.reading, CONFIG))
    put(gradients_at(scratch, 0, LAYER, CONFIG), multiply(tl.trans(weights * similar), d_found, CONFIG))
    d_weights = multiply(d_found, tl.trans(tl.load(at.of_layer(layer, 0, N, CONFIG))), CONFIG)
    add(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG), d_weights * similar)
    d_similar = d_weights * weights
    if CONFIG.spec.erase:
        weights = tl.load(at.table(scratch, at.KEPT + CONFIG.reading, CONFIG))
        put(gradients_at(scratch, 1, LAYER, CONFIG), -multiply(tl.trans(weights * similar), d_found, CONFIG))
        d_weights = -multiply(d_found, tl.trans(tl.load(at.of_layer(layer, 1, N, CONFIG))), CONFIG)
        add(at.table(scratch, at.D_KEPT + CONFIG.reading, CONFIG), d_weights * similar)
        d_similar += d_weights * weights
    queries = load_rows(q, exists, K)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), multiply(tl.trans(d_similar), queries, CONFIG))
    asked = ask_back(gradient, exists, before[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_START + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
    d_q = at.column(scratch, at.START + CONFIG.reading, CONFIG) * asked
    if CONFIG.momentum:
        asked = ask_back(gradient, exists, before[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_PUSHED + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
        d_q += at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG) * asked
    return multiply(d_similar, load_rows(keys, exists, K), CONFIG, d_q)


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
def move_back(keys, exists, layer, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients of a layer's state and momentum after the piece, `back`, to what is written without its rate.

    Kept is what was solved for, the gradient of what was held before the inverse.
    """
    N: tl.constexpr = LAYER.outputs
    C: tl.constexpr = CONFIG.rows
    written = tl.load(at.of_layer(layer, 0, N, CONFIG))
    entering = ask(keys, exists, back[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_WROTE, tl.sum(entering * written, 1), CONFIG)
    d_written = tl.load(gradients_at(scratch, 0, LAYER, CONFIG)) + at.column(scratch, at.WROTE, CONFIG) * entering
    d_rate = tl.zeros((C,), tl.float32)
    if CONFIG.spec.erase:
        held = tl.load(at.of_layer(layer, 1, N, CONFIG))
        at.add_row(scratch, at.D_ERASED, -tl.sum(entering * held, 1), CONFIG)
        d_held = tl.load(gradients_at(scratch, 1, LAYER, CONFIG)) - at.column(scratch, at.ERASED, CONFIG) * entering
        solved = multiply(tl.trans(tl.load(at.table(scratch, LAYER.similar + 1, CONFIG))), d_held, CONFIG)
        put(at.of_layer(layer, 2, N, CONFIG), solved)
        weights = tl.load(at.table(scratch, at.KEPT, CONFIG)) * tl.load(at.table(scratch, LAYER.similar, CONFIG))
        d_rate += tl.sum(multiply(-tl.trans(weights), solved, CONFIG, d_held) * held, 1)
        weights = tl.load(at.table(scratch, LAYER.similar + 2, CONFIG))
        d_written = multiply(tl.trans(weights), solved, CONFIG, d_written)
    if CONFIG.momentum:
        pushing = ask(keys, exists, back[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_LINK, tl.sum(pushing * written, 1), CONFIG)
        d_written += at.column(scratch, at.LINK, CONFIG) * pushing
    at.add_row(scratch, at.D_RATE, d_rate + tl.sum(d_written * written, 1), CONFIG)
    put(gradients_at(scratch, 0, LAYER, CONFIG), at.column(scratch, at.RATE, CONFIG) * d_written)


@triton.jit
def carry_back(keys, exists, layer, before, back, sums, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Turn the gradients of a layer's state and momentum after the piece into those before it. After `move_back`.

    Args:
        sums: Sums over layers with the same keys: gradients of these as far as they enter states and momenta; what
            first states and momenta answer to what was solved for; all `[C, K]`.

    Returns:
        These sums with what the layer adds.
    """
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    d_keys, of_states, of_momenta = sums
    last, d_last = scratch + at.LAST * CONFIG.rows, scratch + at.D_LAST * CONFIG.rows
    d_first, d_pushed, d_momentum_decay = 0.0, 0.0, 0.0
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < N else N
    C: tl.constexpr = CONFIG.rows
    rows = tl.arange(0, C)
    for begin_n in range(0, N, WIDTH):
        n = begin_n + tl.arange(0, WIDTH)
        place = layer + rows[:, None] * N + n[None, :]
        written, solved, held = tl.load(place), tl.zeros((C, WIDTH), tl.float32), tl.load(place)
        if CONFIG.spec.erase:
            held = tl.load(place + CONFIG.matrix)
            solved = tl.load(place + 2 * CONFIG.matrix)
        transposed = tl.arange(0, K)[None, :] * LAYER.row + n[:, None]
        d_keys = multiply(entered(written, held, scratch, CONFIG), tl.load(back[0] + transposed), CONFIG, d_keys)
        if CONFIG.momentum:
            pushes = at.column(scratch, at.LINK, CONFIG) * written
            d_keys = multiply(pushes, tl.load(back[1] + transposed), CONFIG, d_keys)
        if CONFIG.spec.erase:
            of_states = multiply(solved, tl.load(before[0] + transposed).to(tl.float32), CONFIG, of_states)
            if CONFIG.momentum:
                of_momenta = multiply(solved, tl.load(before[1] + transposed).to(tl.float32), CONFIG, of_momenta)
        for begin in range(0, K, BLOCK):
            k = begin + tl.arange(0, BLOCK)
            here = k[:, None] * LAYER.row + n[None, :]
            d_state = tl.load(back[0] + here)
            d_first += tl.sum(d_state * tl.load(before[0] + here))
            d_before = tl.load(last) * d_state
            if CONFIG.spec.erase:
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
    return d_keys, of_states, of_momenta


@triton.jit
def pair_back(layer, exists, sums, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add the gradients of a layer's weights of writes and of erases, each times what keys share, `[C, C]`, to sums."""
    N: tl.constexpr = LAYER.outputs
    solved = layer + 2 * CONFIG.matrix
    of_writes = pairs(solved, layer, exists, N, CONFIG, sums[0])
    return of_writes, pairs(solved, layer + CONFIG.matrix, exists, N, CONFIG, sums[1])


@triton.jit
def keys_back(keys, exists, sums, weights, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move what layers with the same keys have gathered to these, and to the tables.

    Args:
        sums: Result of `carry_back`.
        weights: Result of `pair_back`.
    """
    K: tl.constexpr = LAYER.inputs
    d_keys, of_states, of_momenta = sums
    if CONFIG.spec.erase:
        own = load_rows(keys, exists, K)
        at.add_row(scratch, at.D_START, tl.sum(of_states * own, 1), CONFIG)
        d_keys += at.column(scratch, at.START, CONFIG) * of_states
        if CONFIG.momentum:
            at.add_row(scratch, at.D_PUSHED, tl.sum(of_momenta * own, 1), CONFIG)
            d_keys += at.column(scratch, at.PUSHED, CONFIG) * of_momenta
        similar = tl.load(at.table(scratch, LAYER.similar, CONFIG))
        of_writes, of_erases = weights
        add(at.table(scratch, at.D_WRITE, CONFIG), of_writes * similar)
        add(at.table(scratch, at.D_KEPT, CONFIG), -of_erases * similar)
        d_similar = of_writes * tl.load(at.table(scratch, at.WRITE, CONFIG))
        d_similar -= of_erases * tl.load(at.table(scratch, at.KEPT, CONFIG))
        d_keys = multiply(d_similar, own, CONFIG, d_keys)
        d_keys = multiply(tl.trans(d_similar), own, CONFIG, d_keys)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), d_keys)
