"""How a piece of a chunk moves one linear layer, and what is read of it on the way.

Everything is as in the page above, with the learning rate of a write beside its value instead of in the tables: what is
`written` and `held`, `[C, N]`, is so many times as large. Keys are `[C, K]`; `before` points to the layer's weights and
momentum before the piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import ask, factor, multiply, outer, pairs, put
from hopescale.ops.self_modifying.triton.tables import keep_inverse


@triton.jit
def open_keys(keys, exists, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what follows from keys alone, as `scratch` says, but for products of keys, which the way back needs."""
    if CONFIG.spec.erase:
        similar = pairs(keys, keys, exists, LAYER.inputs, CONFIG)
        put(at.table(scratch, LAYER.similar + 2, CONFIG), tl.load(at.table(scratch, at.WRITE, CONFIG)) * similar)
        keep_erases_left(similar, scratch, LAYER, CONFIG)


@triton.jit
def keep_pairs(keys, exists, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep products of keys with one another, and these times weights of writes; the rest is left to `open_pairs`."""
    if CONFIG.spec.erase:
        similar = pairs(keys, keys, exists, LAYER.inputs, CONFIG)
        put(at.table(scratch, LAYER.similar, CONFIG), similar)
        put(at.table(scratch, LAYER.similar + 2, CONFIG), tl.load(at.table(scratch, at.WRITE, CONFIG)) * similar)


@triton.jit
def open_pairs(scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what `keep_pairs` left."""
    if CONFIG.spec.erase:
        keep_erases_left(tl.load(at.table(scratch, LAYER.similar, CONFIG)), scratch, LAYER, CONFIG)


@triton.jit
def keep_erases_left(similar, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what erases leave, from products of keys."""
    lower = tl.load(at.table(scratch, at.KEPT, CONFIG)) * similar * tl.load(at.row(scratch, at.RATE, CONFIG))[None, :]
    keep_inverse(lower, LAYER.similar + 1, scratch, CONFIG)


@triton.jit
def hold(keys, exists, written, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Return what a layer held under each key just before the write; without erases, what was written.

    What is `written` is a `factor`.
    """
    held = written
    if CONFIG.spec.erase:
        held = ask(keys, exists, before[0], LAYER, CONFIG, None, at.column(scratch, at.START, CONFIG))
        if CONFIG.momentum:
            held = ask(keys, exists, before[1], LAYER, CONFIG, held, at.column(scratch, at.PUSHED, CONFIG))
        held = multiply(tl.load(at.table(scratch, LAYER.similar + 2, CONFIG)), written, CONFIG, held)
        held = multiply(tl.load(at.table(scratch, LAYER.similar + 1, CONFIG)), held, CONFIG)
    return held


@triton.jit
def entered(written, held, scratch, CONFIG: tl.constexpr):
    """Weigh what enters a layer's state, and what enters its momentum, as factors of products."""
    total = at.column(scratch, at.WROTE, CONFIG) * written
    if CONFIG.spec.erase:
        total -= at.column(scratch, at.ERASED, CONFIG) * held
    pushes = total
    if CONFIG.momentum:
        pushes = at.column(scratch, at.LINK, CONFIG) * written
    return factor(total, CONFIG), factor(pushes, CONFIG)


@triton.jit
def move(keys, exists, enters, before, after, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Store a layer's state and momentum where `after` points to, maybe `before`; `enters` is what has `entered`."""
    K: tl.constexpr = LAYER.inputs
    last = scratch + at.LAST * CONFIG.rows
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = k[:, None] * LAYER.row + tl.arange(0, LAYER.outputs)[None, :]
        state = tl.load(last) * tl.load(before[0] + here) + outer(keys, exists, enters[0], k, K, CONFIG)
        if CONFIG.momentum:
            momentum = tl.load(before[1] + here)
            state += tl.load(last + 1) * momentum
            momentum = tl.load(last + 2) * momentum + outer(keys, exists, enters[1], k, K, CONFIG)
            tl.debug_barrier()
            tl.store(after[1] + here, momentum)
            tl.store(after[0] + here, state)
            tl.debug_barrier()
        else:
            put(after[0] + here, state)


@triton.jit
def read_layer(q, keys, exists, written, held, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Read a layer with one query `[C, K]` per token: `[C, N]`."""
    similar = pairs(q, keys, exists, LAYER.inputs, CONFIG)
    weights = factor(tl.load(at.table(scratch, at.WRITE + CONFIG.reading, CONFIG)) * similar, CONFIG)
    if CONFIG.spec.erase:
        erases = factor(tl.load(at.table(scratch, at.KEPT + CONFIG.reading, CONFIG)) * -similar, CONFIG)
        found = multiply(weights, written, CONFIG, multiply(erases, held, CONFIG))
    else:
        found = multiply(weights, written, CONFIG)
    found = ask(q, exists, before[0], LAYER, CONFIG, found, at.column(scratch, at.START + CONFIG.reading, CONFIG))
    if CONFIG.momentum:
        pushed = at.column(scratch, at.PUSHED + CONFIG.reading, CONFIG)
        found = ask(q, exists, before[1], LAYER, CONFIG, found, pushed)
    return found
