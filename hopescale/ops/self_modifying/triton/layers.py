"""How a piece of a chunk moves one linear layer, and what is read of it on the way.

Everything is as in the page above, with the learning rate of a write beside its value instead of in the tables. Keys
are `[C, K]`; `before` points to the layer's weights and momentum before the piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import ask, multiply, outer, pairs, put
from hopescale.ops.self_modifying.triton.tables import keep_inverse


@triton.jit
def open_keys(keys, exists, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep the products of keys with one another and, in the next table, how erases spread over the piece."""
    if CONFIG.spec.erase:
        similar = pairs(keys, keys, exists, LAYER.inputs, CONFIG)
        put(at.table(scratch, LAYER.similar, CONFIG), similar)
        rate = tl.load(at.row(scratch, at.RATE, CONFIG))
        lower = tl.load(at.table(scratch, at.KEPT, CONFIG)) * similar * rate[None, :]
        keep_inverse(lower, LAYER.similar + 1, scratch, CONFIG)


@triton.jit
def hold(keys, exists, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what a layer held under each key just before the write."""
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    if CONFIG.spec.erase:
        weights = tl.load(at.table(scratch, at.WRITE, CONFIG)) * tl.load(at.table(scratch, LAYER.similar, CONFIG))
        held = multiply(weights, at.written(scratch, VALUES, N, CONFIG), CONFIG)
        retrieved = ask(keys, exists, before[0], LAYER, CONFIG)
        held += at.column(scratch, at.START, CONFIG) * retrieved
        if CONFIG.momentum:
            retrieved = ask(keys, exists, before[1], LAYER, CONFIG)
            held += at.column(scratch, at.PUSHED, CONFIG) * retrieved
        held = multiply(tl.load(at.table(scratch, LAYER.similar + 1, CONFIG)), held, CONFIG)
        put(at.whole(scratch, VALUES + 1, N, CONFIG), held)


@triton.jit
def move(keys, exists, before, after, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Store a layer's state and momentum where `after` points to, maybe `before`."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    last, written = scratch + at.LAST * CONFIG.rows, at.written(scratch, VALUES, N, CONFIG)
    entered, pushes = at.column(scratch, at.WROTE, CONFIG) * written, at.column(scratch, at.LINK, CONFIG) * written
    if CONFIG.spec.erase:
        entered -= at.column(scratch, at.ERASED, CONFIG) * at.written(scratch, VALUES + 1, N, CONFIG)
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = k[:, None] * LAYER.row + tl.arange(0, N)[None, :]
        state = tl.load(last) * tl.load(before[0] + here) + outer(keys, exists, entered, k, K, CONFIG)
        if CONFIG.momentum:
            momentum = tl.load(before[1] + here)
            state += tl.load(last + 1) * momentum
            momentum = tl.load(last + 2) * momentum + outer(keys, exists, pushes, k, K, CONFIG)
            put(after[1] + here, momentum)
        put(after[0] + here, state)


@triton.jit
def read_layer(q, keys, exists, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Read a layer with one query `[C, K]` per token: `[C, N]`."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    VALUES: tl.constexpr = LAYER.values
    similar = pairs(q, keys, exists, K, CONFIG)
    weights = tl.load(at.table(scratch, at.WRITE + CONFIG.reading, CONFIG)) * similar
    found = multiply(weights, at.written(scratch, VALUES, N, CONFIG), CONFIG)
    if CONFIG.spec.erase:
        weights = tl.load(at.table(scratch, at.KEPT + CONFIG.reading, CONFIG)) * similar
        found -= multiply(weights, at.written(scratch, VALUES + 1, N, CONFIG), CONFIG)
    retrieved = ask(q, exists, before[0], LAYER, CONFIG)
    found += at.column(scratch, at.START + CONFIG.reading, CONFIG) * retrieved
    if CONFIG.momentum:
        retrieved = ask(q, exists, before[1], LAYER, CONFIG)
        found += at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG) * retrieved
    return found
