"""The last backward kernels: what has come back to a chunk, as gradients of its values, keys, queries and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.delta_rule.triton.tables import (
    decay_weights,
    gate_gradient,
    last_weights,
    load_gate,
    load_tokens,
    locate,
    reading_tables,
    similarities,
    store_tokens,
)


@triton.jit
def values_kernel(
    k,
    u,
    q,
    eta,
    alpha,
    mu,
    inverses,
    held,
    d_output,
    d_written,
    d_erased,
    du,
    d_eta,
    solved,
    d_decay,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Solve backwards, and gather the gradients of values, of `eta`, and of what multiplies pairs of tokens.

    Those come in `d_decay` as pairs for erases and for writes: two for the solve and two for the reads.
    """
    MOMENTUM: tl.constexpr = mu is not None
    rows = tl.arange(0, C)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    rate = load_gate(eta, at, exists, 0.0)
    square = rows[:, None] * C + rows[None, :]
    rate_gradient = tl.zeros((C,), tl.float32)
    solve_kept, solve_write = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    read_kept, read_write = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    if held is not None:
        kept, start, chain, from_start, write, push = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
        similar = tl.trans(similarities(k, k, at, exists, D, BD, PRECISION))
        kept, write = tl.trans(kept) * similar, tl.trans(write) * similar
    for first in range(0, DO, BV):
        v = first + tl.arange(0, BV)
        values, written = load_tokens(u, at, exists, v, DO), load_tokens(d_written, at, exists, v, DO)
        writes = tl.trans(rate[:, None] * values)
        if held is not None:
            found = load_tokens(held, at, exists, v, DO)
            erases = tl.trans(-rate[:, None] * found)
            erased = load_tokens(d_erased, at, exists, v, DO) if MOMENTUM else -written
            inverse = tl.trans(tl.load(inverses + slot * C * C + square))
            right = tl.dot(inverse, rate[:, None] * erased, input_precision=PRECISION)
            store_tokens(solved, at, exists, v, right, DO)
            erased -= tl.dot(kept, right, input_precision=PRECISION)
            written += tl.dot(write, right, input_precision=PRECISION)
            rate_gradient += tl.sum(erased * found, 1)
            if MOMENTUM:
                solve_write += tl.dot(right, writes, input_precision=PRECISION)
            else:
                erases += writes
            solve_kept += tl.dot(right, erases, input_precision=PRECISION)
        else:
            erases = writes
        rate_gradient += tl.sum(written * values, 1)
        store_tokens(du, at, exists, v, rate[:, None] * written, DO)
        if q is not None:
            gradient = load_tokens(d_output, at, exists, v, DO)
            if MOMENTUM:
                read_write += tl.dot(gradient, writes, input_precision=PRECISION)
            if held is not None or not MOMENTUM:
                read_kept += tl.dot(gradient, erases, input_precision=PRECISION)
    tl.store(d_eta + at, rate_gradient, mask=exists)
    table = d_decay + slot * 4 * C * C + square
    tl.store(table, solve_kept)
    tl.store(table + C * C, solve_write)
    tl.store(table + 2 * C * C, read_kept)
    tl.store(table + 3 * C * C, read_write)


@triton.jit
def pull(x, scale, matrix, weight, own, at, exists, d, D: tl.constexpr, DO: tl.constexpr, BV: tl.constexpr, PRECISION):
    """Move a gradient through `weight * (own @ matrix.T)`.

    Args:
        x: Pointer to the gradient of the result, `DO` wide; to be multiplied with `scale` `[C]`.
        matrix: Pointer to a matrix `[DO, D]`.
        weight: Of each row `[C]`.
        own: Rows `[C, D]`.

    Returns:
        The gradients of `own` and `weight`.
    """
    product = tl.zeros(own.shape, tl.float32)
    for first in range(0, DO, BV):
        v = first + tl.arange(0, BV)
        part = tl.load(matrix + v[:, None] * D + d[None, :])
        product += tl.dot(load_tokens(x, at, exists, v, DO), part, input_precision=PRECISION)
    product *= scale[:, None]
    return weight[:, None] * product, tl.sum(own * product, 1)


@triton.jit
def inner(a, b, d, D: tl.constexpr, DO: tl.constexpr, BV: tl.constexpr):
    """Sum of the products of two `[DO, D]` matrices, entry by entry."""
    total = 0.0
    for first in range(0, DO, BV):
        tile = (first + tl.arange(0, BV))[:, None] * D + d[None, :]
        total += tl.sum(tl.load(a + tile) * tl.load(b + tile))
    return total


@triton.jit
def keys_kernel(
    k,
    u,
    q,
    eta,
    alpha,
    mu,
    states,
    momenta,
    held,
    solved,
    d_states,
    d_momenta,
    d_decay,
    d_shares,
    d_first_shares,
    dk,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gather the gradients of keys, and of the weights of what enters and of what is asked."""
    MOMENTUM: tl.constexpr = mu is not None
    rows, d = tl.arange(0, C), tl.arange(0, D)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    rate, retention = load_gate(eta, at, exists, 0.0), load_gate(alpha, at, exists, 1.0)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    kept, start, chain, from_start, write, push = decay
    erase, first, wrote, pushed, link, momentum_decay = last_weights(decay, retention, rows, size, MOMENTUM)
    keys, ones = load_tokens(k, at, exists, d, D), tl.full((C,), 1.0, tl.float32)
    s, ds = states + slot * DO * D, d_states + slot * DO * D
    pairs = d_decay + slot * 4 * C * C + rows[:, None] * C + rows[None, :]
    gradient, d_wrote = pull(u, rate, ds, wrote, keys, at, exists, d, D, DO, BV, PRECISION)
    tl.store(d_shares + 7 * at, d_wrote, mask=exists)
    tl.store(d_first_shares + 3 * slot, inner(s, ds, d, D, DO, BV))
    if MOMENTUM:
        z, dz = momenta + slot * DO * D, d_momenta + slot * DO * D
        more, d_link = pull(u, rate, dz, link, keys, at, exists, d, D, DO, BV, PRECISION)
        gradient += more
        tl.store(d_shares + 7 * at + 1, d_link, mask=exists)
        tl.store(d_first_shares + 3 * slot + 1, inner(z, ds, d, D, DO, BV))
        tl.store(d_first_shares + 3 * slot + 2, inner(z, dz, d, D, DO, BV))
    if held is not None:
        more, d_erase = pull(held, -rate, ds, erase, keys, at, exists, d, D, DO, BV, PRECISION)
        rest, d_start = pull(solved, ones, s, start, keys, at, exists, d, D, DO, BV, PRECISION)
        gradient += more + rest
        tl.store(d_shares + 7 * at + 2, d_erase, mask=exists)
        tl.store(d_shares + 7 * at + 3, d_start, mask=exists)
        if MOMENTUM:
            more, d_push = pull(solved, ones, z, push, keys, at, exists, d, D, DO, BV, PRECISION)
            gradient += more
            tl.store(d_shares + 7 * at + 4, d_push, mask=exists)
        similar = tl.load(pairs) * kept + tl.load(pairs + C * C) * write
        gradient += tl.dot(similar + tl.trans(similar), keys, input_precision=PRECISION)
    if q is not None:
        kept, start, write, push = reading_tables(decay, retention, rows, READ, MOMENTUM)
        similar = tl.load(pairs + 2 * C * C) * kept + tl.load(pairs + 3 * C * C) * write
        queries = load_tokens(q, at, exists, d, D)
        gradient += tl.dot(tl.trans(similar), queries, input_precision=PRECISION)
    store_tokens(dk, at, exists, d, gradient, D)


@triton.jit
def queries_kernel(
    k,
    q,
    alpha,
    mu,
    states,
    momenta,
    d_output,
    d_decay,
    d_shares,
    dq,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    DO: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gather the gradients of queries, and of the weights of what they read."""
    MOMENTUM: tl.constexpr = mu is not None
    rows, d = tl.arange(0, C), tl.arange(0, D)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    kept, start, write, push = reading_tables(decay, load_gate(alpha, at, exists, 1.0), rows, READ, MOMENTUM)
    queries, ones, s = load_tokens(q, at, exists, d, D), tl.full((C,), 1.0, tl.float32), states + slot * DO * D
    gradient, d_start = pull(d_output, ones, s, start, queries, at, exists, d, D, DO, BV, PRECISION)
    tl.store(d_shares + 7 * at + 5, d_start, mask=exists)
    if MOMENTUM:
        z = momenta + slot * DO * D
        more, d_push = pull(d_output, ones, z, push, queries, at, exists, d, D, DO, BV, PRECISION)
        gradient += more
        tl.store(d_shares + 7 * at + 6, d_push, mask=exists)
    pairs = d_decay + (slot * 4 + 2) * C * C + rows[:, None] * C + rows[None, :]
    similar = tl.load(pairs) * kept + tl.load(pairs + C * C) * write
    gradient += tl.dot(similar, load_tokens(k, at, exists, d, D), input_precision=PRECISION)
    store_tokens(dq, at, exists, d, gradient, D)


@triton.jit
def gates_back(
    decay, before, after, last_link, last_momentum_decay, retention, push_retention, rows, MOMENTUM, PRECISION
):
    """Turn the gradients of a chunk's tables into those of `alpha` and `mu`, each `[C]`.

    Args:
        decay: Result of `decay_weights`.
        before: Gradients of `kept`, `start`, `write` and `push` of the state before each token's write.
        after: The same of the state after it.
        last_link: Gradient of `chain` beyond that, `[C, C]`.
        last_momentum_decay: Gradient of `from_start` beyond that, `[C]`.
        retention: `alpha` `[C]`.
        push_retention: `mu` `[C]`; unused without momentum.
    """
    kept, start, chain, from_start, write, push = decay
    d_alpha = tl.sum(after[0] * kept, 1) + after[1] * start
    d_kept, d_start = before[0] + retention[:, None] * after[0], before[1] + retention * after[1]
    d_mu = d_alpha
    if MOMENTUM:
        d_alpha += tl.sum(after[2] * write, 1) + after[3] * push
        d_write, d_push = before[2] + retention[:, None] * after[2], before[3] + retention * after[3]
        d_chain = after[2] + last_link + tl.dot(tl.trans(kept), d_write, input_precision=PRECISION)
        d_from_start = after[3] + last_momentum_decay + tl.sum(kept * d_push[:, None], 0)
        d_mu = gate_gradient(d_chain * chain, d_from_start * from_start, push_retention, rows, 0, PRECISION)
        d_kept += tl.dot(d_write, tl.trans(chain), input_precision=PRECISION) + d_push[:, None] * from_start[None, :]
    d_alpha += gate_gradient(d_kept * kept, d_start * start, retention, rows, 1, PRECISION)
    return d_alpha, d_mu


@triton.jit
def gates_kernel(
    k,
    q,
    alpha,
    mu,
    d_decay,
    d_shares,
    d_first_shares,
    d_alpha,
    d_mu,
    tokens,
    heads,
    chunk,
    D: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
    ERASE: tl.constexpr,
    READ: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gather the gradients of retention and momentum."""
    MOMENTUM: tl.constexpr = mu is not None
    rows = tl.arange(0, C)
    at, exists, size, slot = locate(rows, tokens, heads, chunk)
    retention, last = load_gate(alpha, at, exists, 1.0), tl.where(rows == size - 1, 1.0, 0.0)
    decay = decay_weights(alpha, mu, at, heads, rows, size, PRECISION)
    shares, first_shares = d_shares + 7 * at, d_first_shares + 3 * slot
    pairs = d_decay + slot * 4 * C * C + rows[:, None] * C + rows[None, :]
    kept, write = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    if ERASE:
        similar = similarities(k, k, at, exists, D, BD, PRECISION)
        kept, write = tl.load(pairs) * similar, tl.load(pairs + C * C) * similar
    before = (kept, load_gate(shares, 3, exists, 0.0), write, load_gate(shares, 4, exists, 0.0))
    wrote, erase = load_gate(shares, 0, exists, 0.0), load_gate(shares, 2, exists, 0.0)
    if not MOMENTUM:
        erase += wrote
    kept, write = last[:, None] * erase[None, :], last[:, None] * wrote[None, :]  # what enters is the last row
    after = (kept, last * tl.load(first_shares), write, last * tl.load(first_shares + 1))
    if q is not None and READ != "boundary":
        similar = similarities(q, k, at, exists, D, BD, PRECISION)
        kept, write = tl.load(pairs + 2 * C * C) * similar, tl.load(pairs + 3 * C * C) * similar
        start, push = load_gate(shares, 5, exists, 0.0), load_gate(shares, 6, exists, 0.0)
        if READ == "inclusive":
            after = (after[0] + kept, after[1] + start, after[2] + write, after[3] + push)
        else:
            before = (before[0] + kept, before[1] + start, before[2] + write, before[3] + push)
    push_retention = retention
    if MOMENTUM:
        push_retention = load_gate(mu, at, exists, 1.0)
    link = last[:, None] * load_gate(shares, 1, exists, 0.0)[None, :]
    momentum_decay = last * tl.load(first_shares + 2)
    alpha_back, mu_back = gates_back(
        decay, before, after, link, momentum_decay, retention, push_retention, rows, MOMENTUM, PRECISION
    )
    tl.store(d_alpha + at, alpha_back, mask=exists)
    if MOMENTUM:
        tl.store(d_mu + at, mu_back, mask=exists)
