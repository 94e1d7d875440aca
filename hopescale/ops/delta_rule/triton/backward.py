"""The backward kernels that move gradients along the tokens; `gradients.py` has those of the arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import (
    decay_weights,
    load_gate,
    load_tokens,
    locate,
    reading_tables,
    similarities,
    store_tokens,
)


@triton.jit
def read_back_kernel(
    k,
    q,
    alpha,
    mu,
    d_output,
    d_written,
    d_erased,
    read_shares,
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
    """Move gradients from what was read to what had been written and erased in the same chunk."""
    rows, v = tl.arange(0, C), tl.program_id(2) * BV + tl.arange(0, BV)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    kept, start, write, push = reading_tables(decay, load_gate(alpha, at, exists, 1.0), rows, READ, mu is not None)
    similar = tl.trans(similarities(q, k, at, exists, D, BD, PRECISION))
    gradient = load_tokens(d_output, at, exists, v, DO)
    store_tokens(d_written, at, exists, v, tl.dot(tl.trans(write) * similar, gradient, input_precision=PRECISION), DO)
    if d_erased is not None:
        gradient = tl.dot(tl.trans(kept) * similar, -gradient, input_precision=PRECISION)
        store_tokens(d_erased, at, exists, v, gradient, DO)
    if tl.program_id(2) == 0:
        tl.store(read_shares + 2 * at, start, mask=exists)
        tl.store(read_shares + 2 * at + 1, push, mask=exists)


@triton.jit
def states_back_kernel(
    k,
    q,
    eta,
    shares,
    first_shares,
    read_shares,
    state_keys,
    momentum_keys,
    d_output,
    d_written,
    d_erased,
    d_last_state,
    d_last_momentum,
    d_states,
    d_momenta,
    d_state,
    d_momentum,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry the memory's gradient from chunk to chunk, backwards. Keeps what each chunk gets from those after it.

    Adds to `d_written` and `d_erased` what reaches a chunk's writes and erases through the memory it ends with.
    """
    MOMENTUM: tl.constexpr = d_momentum is not None
    head = tl.program_id(0).to(tl.int64)
    rows, d, v = tl.arange(0, C), tl.arange(0, D), tl.program_id(1) * BV + tl.arange(0, BV)
    tile = d[:, None] + v[None, :] * D  # the memory, transposed
    ds = tl.load(d_last_state + head * DO * D + tile)
    dz = tl.load(d_last_momentum + head * DO * D + tile) if MOMENTUM else ds
    chunks = tl.cdiv(tokens, chunk)
    for step in range(chunks):
        n = chunks - 1 - step
        slot = head * chunks + n
        exists = rows < tl.minimum(chunk, tokens - n * chunk)
        at = (head // heads * tokens + n * chunk + rows) * heads + head % heads
        tl.store(d_states + slot * DO * D + tile, ds)
        keys = load_tokens(k, at, exists, d, D)
        seen = tl.dot(keys, ds, input_precision=PRECISION)
        written = load_tokens(d_written, at, exists, v, DO) + load_gate(shares + 1, 3 * at, exists, 0.0)[:, None] * seen
        erased = -written
        if MOMENTUM:
            tl.store(d_momenta + slot * DO * D + tile, dz)
            pushes = tl.dot(keys, dz, input_precision=PRECISION)
            written += load_gate(shares + 2, 3 * at, exists, 0.0)[:, None] * pushes
            dz = tl.load(first_shares + 3 * slot + 2) * dz + tl.load(first_shares + 3 * slot + 1) * ds
        store_tokens(d_written, at, exists, v, written, DO)
        ds = tl.load(first_shares + 3 * slot) * ds
        if d_erased is not None:
            erased = load_tokens(d_erased, at, exists, v, DO) - load_gate(shares, 3 * at, exists, 0.0)[:, None] * seen
            store_tokens(d_erased, at, exists, v, erased, DO)
        if state_keys is not None:
            erased *= load_gate(eta, at, exists, 0.0)[:, None]
            ds += tl.dot(tl.trans(load_tokens(state_keys, at, exists, d, D)), erased, input_precision=PRECISION)
            if MOMENTUM:
                dz += tl.dot(tl.trans(load_tokens(momentum_keys, at, exists, d, D)), erased, input_precision=PRECISION)
        if q is not None:
            queries = tl.trans(load_tokens(q, at, exists, d, D))
            gradient = load_tokens(d_output, at, exists, v, DO)
            weighted = load_gate(read_shares, 2 * at, exists, 0.0)[:, None] * gradient
            ds += tl.dot(queries, weighted, input_precision=PRECISION)
            if MOMENTUM:
                weighted = load_gate(read_shares + 1, 2 * at, exists, 0.0)[:, None] * gradient
                dz += tl.dot(queries, weighted, input_precision=PRECISION)
    tl.store(d_state + head * DO * D + tile, ds)
    if MOMENTUM:
        tl.store(d_momentum + head * DO * D + tile, dz)
