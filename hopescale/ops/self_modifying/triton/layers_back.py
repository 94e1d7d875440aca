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
    factor,
    load_rows,
    multiply,
    outer,
    pairs,
    put,
    tile,
)


@triton.jit
def gradients_at(scratch, BEHIND: tl.constexpr, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Point to the gradients of what is written, or of what was held, entry by entry."""
    return at.whole(scratch, LAYER.d_values + BEHIND, LAYER.outputs, CONFIG)


@triton.jit
def keep_asked(q, keys, exists, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep the products of queries and keys."""
    put(at.table(scratch, at.ASKED, CONFIG), pairs(q, keys, exists, LAYER.inputs, CONFIG))


@triton.jit
def read_back(
    q, keys, exists, layer, gradient, d_q, scratch, ERASES: tl.constexpr, LAYER: tl.constexpr, CONFIG: tl.constexpr
):
    """Move the gradient of what `read_layer` read to keys, and to queries at `d_q`, and keep that of writes.

    Done is what is read of writes, or of erases, after `keep_asked`. What is read of the first state and momentum is
    `read_starts_back`.
    """
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    BEHIND: tl.constexpr = 1 if ERASES else 0
    TABLE: tl.constexpr = (at.KEPT if ERASES else at.WRITE) + CONFIG.reading
    GRADIENT: tl.constexpr = (at.D_KEPT if ERASES else at.D_WRITE) + CONFIG.reading
    d_found = load_rows(gradient, exists, N)
    if ERASES:
        d_found = -d_found
    d_found = factor(d_found, CONFIG)
    weights = tl.load(at.table(scratch, TABLE, CONFIG)) * tl.load(at.table(scratch, at.ASKED, CONFIG))
    put(gradients_at(scratch, BEHIND, LAYER, CONFIG), multiply(tl.trans(factor(weights, CONFIG)), d_found, CONFIG))
    d_weights = multiply(d_found, tl.trans(tl.load(at.of_layer(layer, BEHIND, N, CONFIG))), CONFIG)
    add(at.table(scratch, GRADIENT, CONFIG), d_weights * tl.load(at.table(scratch, at.ASKED, CONFIG)))
    d_similar = factor(d_weights * tl.load(at.table(scratch, TABLE, CONFIG)), CONFIG)
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), multiply(tl.trans(d_similar), load_rows(q, exists, K), CONFIG))
    add(tile(d_q, CONFIG.rows, K), multiply(d_similar, load_rows(keys, exists, K), CONFIG))


@triton.jit
def read_starts_back(q, exists, gradient, before, d_q, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add to the gradients of queries, at `d_q`, and of tables what `read_layer` read of first state and momentum."""
    K: tl.constexpr = LAYER.inputs
    queries = load_rows(q, exists, K)
    asked = ask_back(gradient, exists, before[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_START + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
    total = at.column(scratch, at.START + CONFIG.reading, CONFIG) * asked
    if CONFIG.momentum:
        asked = ask_back(gradient, exists, before[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_PUSHED + CONFIG.reading, tl.sum(asked * queries, 1), CONFIG)
        total += at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG) * asked
    add(tile(d_q, CONFIG.rows, K), total)


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
def move_states_back(keys, exists, layer, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of a layer's state after the piece, `back`, to what is written and held without its rate.

    Kept is what was solved for, the gradient of what was held before the inverse.
    """
    N: tl.constexpr = LAYER.outputs
    entering = ask(keys, exists, back[0], LAYER, CONFIG)
    at.add_row(scratch, at.D_WROTE, tl.sum(entering * tl.load(at.of_layer(layer, 0, N, CONFIG)), 1), CONFIG)
    add(gradients_at(scratch, 0, LAYER, CONFIG), at.column(scratch, at.WROTE, CONFIG) * entering)
    if CONFIG.spec.erase:
        held = tl.load(at.of_layer(layer, 1, N, CONFIG))
        at.add_row(scratch, at.D_ERASED, -tl.sum(entering * held, 1), CONFIG)
        d_held = tl.load(gradients_at(scratch, 1, LAYER, CONFIG)) - at.column(scratch, at.ERASED, CONFIG) * entering
        solved = multiply(tl.trans(tl.load(at.table(scratch, LAYER.similar + 1, CONFIG))), d_held, CONFIG)
        put(at.of_layer(layer, 2, N, CONFIG), solved)
        weights = tl.load(at.table(scratch, at.KEPT, CONFIG)) * tl.load(at.table(scratch, LAYER.similar, CONFIG))
        d_held = multiply(-tl.trans(weights), solved, CONFIG, d_held)
        at.add_row(scratch, at.D_RATE, tl.sum(d_held * tl.load(at.of_layer(layer, 1, N, CONFIG)), 1), CONFIG)


@triton.jit
def move_back(keys, exists, layer, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of a layer's momentum after the piece too, and keep that of what is written without its rate.

    After `move_states_back`.
    """
    N: tl.constexpr = LAYER.outputs
    d_written = tl.load(gradients_at(scratch, 0, LAYER, CONFIG))
    if CONFIG.spec.erase:
        weights = tl.load(at.table(scratch, LAYER.similar + 2, CONFIG))
        d_written = multiply(tl.trans(weights), tl.load(at.of_layer(layer, 2, N, CONFIG)), CONFIG, d_written)
    written = tl.load(at.of_layer(layer, 0, N, CONFIG))
    if CONFIG.momentum:
        pushing = ask(keys, exists, back[1], LAYER, CONFIG)
        at.add_row(scratch, at.D_LINK, tl.sum(pushing * written, 1), CONFIG)
        d_written += at.column(scratch, at.LINK, CONFIG) * pushing
    at.add_row(scratch, at.D_RATE, tl.sum(d_written * written, 1), CONFIG)
    put(gradients_at(scratch, 0, LAYER, CONFIG), at.column(scratch, at.RATE, CONFIG) * d_written)


@triton.jit
def transposed(matrix, begin, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Load columns of a layer's matrix, from one on, as rows `[width, K]`."""
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < LAYER.outputs else LAYER.outputs
    n, k = begin + tl.arange(0, WIDTH), tl.arange(0, LAYER.inputs)
    return tl.load(matrix + k[None, :] * LAYER.row + n[:, None]).to(tl.float32)


@triton.jit
def columns_of(layer, BEHIND: tl.constexpr, begin, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Load columns of what `of_layer` points to, from one on: `[C, width]`."""
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < LAYER.outputs else LAYER.outputs
    n = begin + tl.arange(0, WIDTH)
    return tl.load(layer + BEHIND * CONFIG.matrix + tl.arange(0, CONFIG.rows)[:, None] * LAYER.outputs + n[None, :])


@triton.jit
def entered_back(layer, back, total, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add to a sum `[C, K]` the gradients of keys, as far as these enter a layer's state and momentum."""
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < LAYER.outputs else LAYER.outputs
    for begin in range(0, LAYER.outputs, WIDTH):
        written = columns_of(layer, 0, begin, LAYER, CONFIG)
        held = written
        if CONFIG.spec.erase:
            held = columns_of(layer, 1, begin, LAYER, CONFIG)
        enters, pushes = entered(written, held, scratch, CONFIG)
        total = multiply(enters, transposed(back[0], begin, LAYER, CONFIG), CONFIG, total)
        if CONFIG.momentum:
            total = multiply(pushes, transposed(back[1], begin, LAYER, CONFIG), CONFIG, total)
    return total


@triton.jit
def solved_back(layer, before, sums, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add to two sums `[C, K]` what a layer's first state and momentum answer to what was solved for."""
    of_states, of_momenta = sums
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < LAYER.outputs else LAYER.outputs
    for begin in range(0, LAYER.outputs, WIDTH):
        solved = factor(columns_of(layer, 2, begin, LAYER, CONFIG), CONFIG)
        of_states = multiply(solved, transposed(before[0], begin, LAYER, CONFIG), CONFIG, of_states)
        if CONFIG.momentum:
            of_momenta = multiply(solved, transposed(before[1], begin, LAYER, CONFIG), CONFIG, of_momenta)
    return of_states, of_momenta


@triton.jit
def carry_back(keys, exists, layer, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Turn the gradients of a layer's state and momentum after the piece into those before it; nothing else follows."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    WIDTH: tl.constexpr = CONFIG.block if CONFIG.block < N else N
    last, d_ends = scratch + at.LAST * CONFIG.rows, at.matrix(scratch, at.D_ENDS, CONFIG) + tl.arange(0, BLOCK)
    for begin_n in range(0, N, WIDTH):
        n = begin_n + tl.arange(0, WIDTH)
        for begin in range(0, K, BLOCK):
            k = begin + tl.arange(0, BLOCK)
            here = k[:, None] * LAYER.row + n[None, :]
            if CONFIG.momentum:
                momentum, d_momentum = tl.load(before[1] + here), tl.load(back[1] + here)
                add(d_ends + 2 * CONFIG.block, tl.sum(d_momentum * momentum, 1))
                d_state = tl.load(back[0] + here)
                add(d_ends + CONFIG.block, tl.sum(d_state * momentum, 1))
                d_momentum = tl.load(last + 2) * d_momentum + tl.load(last + 1) * d_state
                if CONFIG.spec.erase:
                    solved = at.column(scratch, at.PUSHED, CONFIG) * columns_of(layer, 2, begin_n, LAYER, CONFIG)
                    d_momentum = outer(keys, exists, solved, k, K, CONFIG, d_momentum)
                put(back[1] + here, d_momentum)
            d_state = tl.load(back[0] + here)
            add(d_ends, tl.sum(d_state * tl.load(before[0] + here), 1))
            d_state *= tl.load(last)
            if CONFIG.spec.erase:
                solved = at.column(scratch, at.START, CONFIG) * columns_of(layer, 2, begin_n, LAYER, CONFIG)
                d_state = outer(keys, exists, solved, k, K, CONFIG, d_state)
            put(back[0] + here, d_state)


@triton.jit
def pair_back(layer, exists, sums, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add the gradients of a layer's weights of writes and of erases, each times what keys share, `[C, C]`, to sums."""
    N: tl.constexpr = LAYER.outputs
    solved = layer + 2 * CONFIG.matrix
    of_writes = pairs(solved, layer, exists, N, CONFIG, sums[0])
    return of_writes, pairs(solved, layer + CONFIG.matrix, exists, N, CONFIG, sums[1])


@triton.jit
def starts_back(keys, exists, sums, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move what `solved_back` has summed, `sums`, to keys and to the weights of first states and momenta."""
    own, total = load_rows(keys, exists, LAYER.inputs), at.column(scratch, at.START, CONFIG) * sums[0]
    at.add_row(scratch, at.D_START, tl.sum(sums[0] * own, 1), CONFIG)
    if CONFIG.momentum:
        at.add_row(scratch, at.D_PUSHED, tl.sum(sums[1] * own, 1), CONFIG)
        total += at.column(scratch, at.PUSHED, CONFIG) * sums[1]
    add(at.whole(scratch, LAYER.d_keys, LAYER.inputs, CONFIG), total)


@triton.jit
def keys_back(keys, exists, weights, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move what `pair_back` summed over layers with the same keys, `weights`, to these, and to the tables."""
    K: tl.constexpr = LAYER.inputs
    of_writes, of_erases = weights
    similar = tl.load(at.table(scratch, LAYER.similar, CONFIG))
    add(at.table(scratch, at.D_WRITE, CONFIG), of_writes * similar)
    add(at.table(scratch, at.D_KEPT, CONFIG), -of_erases * similar)
    d_similar = of_writes * tl.load(at.table(scratch, at.WRITE, CONFIG))
    d_similar = factor(d_similar - of_erases * tl.load(at.table(scratch, at.KEPT, CONFIG)), CONFIG)
    own = factor(load_rows(keys, exists, K), CONFIG)
    d_keys = multiply(tl.trans(d_similar), own, CONFIG, multiply(d_similar, own, CONFIG))
    add(at.whole(scratch, LAYER.d_keys, K, CONFIG), d_keys)
