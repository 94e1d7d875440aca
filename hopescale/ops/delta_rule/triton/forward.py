"""The forward kernels: `states_kernel` walks the chunks of a head, the others take all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import (
    answers,
    decay_weights,
    last_weights,
    load_gate,
    load_tokens,
    locate,
    reading_tables,
    similarities,
    store_tokens,
    unit_inverse,
)


@triton.jit
def prepare_kernel(
    k,
    u,
    eta,
    alpha,
    mu,
    shares,
    first_shares,
    state_keys,
    momentum_keys,
    known,
    inverses,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute how a chunk acts on the memory it begins with, whatever that memory is."""
    MOMENTUM: tl.constexpr = mu is not None
    rows = tl.arange(0, C)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    rate, retention = load_gate(eta, at, exists, 0.0), load_gate(alpha, at, exists, 1.0)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    erase, first, wrote, pushed, link, momentum_decay = last_weights(decay, retention, rows, size, MOMENTUM)
    tl.store(shares + 3 * at, erase, mask=exists)
    tl.store(shares + 3 * at + 1, wrote, mask=exists)
    tl.store(shares + 3 * at + 2, link, mask=exists)
    tl.store(first_shares + 3 * slot, first)
    tl.store(first_shares + 3 * slot + 1, pushed)
    tl.store(first_shares + 3 * slot + 2, momentum_decay)
    if ERASE:
        kept, start, chain, from_start, write, push = decay
        similar = similarities(k, k, at, exists, D, BD, PRECISION) * rate[None, :]
        inverse = unit_inverse(kept * similar, rows, DOUBLINGS, PRECISION)
        if inverses is not None:
            tl.store(inverses + slot * C * C + rows[:, None] * C + rows[None, :], inverse)
        for first_column in range(0, D, BD):
            d = first_column + tl.arange(0, BD)
            keys = load_tokens(k, at, exists, d, D)
            store_tokens(
                state_keys, at, exists, d, tl.dot(inverse, start[:, None] * keys, input_precision=PRECISION), D
            )
            if MOMENTUM:
                pushes = tl.dot(inverse, push[:, None] * keys, input_precision=PRECISION)
                store_tokens(momentum_keys, at, exists, d, pushes, D)
        if known is not None:
            inverse = tl.dot(inverse, write * similar, input_precision=PRECISION)
            for first_column in range(0, DO, BV):
                v = first_column + tl.arange(0, BV)
                values = load_tokens(u, at, exists, v, DO)
                store_tokens(known, at, exists, v, tl.dot(inverse, values, input_precision=PRECISION), DO)


@triton.jit
def states_kernel(
    k,
    u,
    eta,
    shares,
    first_shares,
    state_keys,
    momentum_keys,
    known,
    state,
    momentum,
    states,
    momenta,
    held,
    last_state,
    last_momentum,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry the memory from chunk to chunk. Keeps what each begins with, and what was held under each key."""
    MOMENTUM: tl.constexpr = momentum is not None
    head = tl.program_id(0).to(tl.int64)
    rows, d, v = tl.arange(0, C), tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    tile = d[:, None] + v[None, :] * D  # the memory, transposed
    s = tl.load(state + head * DO * D + tile)
    z = tl.load(momentum + head * DO * D + tile) if MOMENTUM else s
    chunks = tl.cdiv(tokens, chunk)
    for n in range(chunks):
        slot = head * chunks + n
        exists = rows < tl.minimum(chunk, tokens - n * chunk)
        at = (head // heads * tokens + n * chunk + rows) * heads + head % heads
        tl.store(states + slot * DO * D + tile, s)
        if MOMENTUM:
            tl.store(momenta + slot * DO * D + tile, z)
        values = load_gate(eta, at, exists, 0.0)[:, None] * load_tokens(u, at, exists, v, DO)
        entered = load_gate(shares + 1, 3 * at, exists, 0.0)[:, None] * values
        if held is not None:
            found = load_tokens(known, at, exists, v, DO)
            found += tl.dot(load_tokens(state_keys, at, exists, d, D), s, input_precision=PRECISION)
            if MOMENTUM:
                found += tl.dot(load_tokens(momentum_keys, at, exists, d, D), z, input_precision=PRECISION)
            store_tokens(held, at, exists, v, found, DO)
            entered -= (load_gate(shares, 3 * at, exists, 0.0) * load_gate(eta, at, exists, 0.0))[:, None] * found
        keys = tl.trans(load_tokens(k, at, exists, d, D))
        s = tl.load(first_shares + 3 * slot) * s + tl.dot(keys, entered, input_precision=PRECISION)
        if MOMENTUM:
            s += tl.load(first_shares + 3 * slot + 1) * z
            pushes = load_gate(shares + 2, 3 * at, exists, 0.0)[:, None] * values
            z = tl.load(first_shares + 3 * slot + 2) * z + tl.dot(keys, pushes, input_precision=PRECISION)
    tl.store(last_state + head * DO * D + tile, s)
    if MOMENTUM:
        tl.store(last_momentum + head * DO * D + tile, z)


@triton.jit
def read_kernel(
    k,
    u,
    q,
    eta,
    alpha,
    mu,
    states,
    momenta,
    held,
    output,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Read with one query per token, from what a chunk began with and what it wrote."""
    MOMENTUM: tl.constexpr = mu is not None
    rows, v = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    rate, retention = load_gate(eta, at, exists, 0.0), load_gate(alpha, at, exists, 1.0)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    kept, start, write, push = reading_tables(decay, retention, rows, READ, MOMENTUM)
    similar = similarities(q, k, at, exists, D, BD, PRECISION) * rate[None, :]
    found = start[:, None] * answers(q, at, exists, states + slot * DO * D, v, D, BD, PRECISION)
    found += tl.dot(write * similar, load_tokens(u, at, exists, v, DO), input_precision=PRECISION)
    if held is not None:
        found -= tl.dot(kept * similar, load_tokens(held, at, exists, v, DO), input_precision=PRECISION)
    if MOMENTUM:
        found += push[:, None] * answers(q, at, exists, momenta + slot * DO * D, v, D, BD, PRECISION)
    store_tokens(output, at, exists, v, found, DO)
