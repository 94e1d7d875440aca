"""The tables of a piece of a chunk, from its gates alone, and the inverse of a triangular one.

Tables are `[C, C]`: rows are reading tokens, columns writing tokens. The learning rate of a write stands beside its
value, so that all of them are products of gates. Tokens that do not exist have a learning rate of 0 and gates of 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import multiply, multiply_exactly, put

SMALLEST_GATE = tl.constexpr(2.0**-126)
"""Smallest normal float32: gates below it count as this."""


@triton.jit
def summed_logs(gate):
    """Sum the logs to base 2 of a gate `[C]` up to each token: multiples of 1/256, and the rests.

    Differences of the former are exact, so that a gate of almost 0 takes no digits from products over other tokens.
    """
    log = tl.log2(tl.maximum(gate, SMALLEST_GATE))
    coarse = tl.floor(log * 256) / 256
    return tl.cumsum(coarse, 0), tl.cumsum(log - coarse, 0)


@triton.jit
def keep_logs(GATE: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Keep what `summed_logs` returns of a gate, in two rows."""
    coarse, fine = summed_logs(tl.load(at.row(scratch, GATE, CONFIG)))
    put(at.row(scratch, GATE + at.COARSE, CONFIG), coarse)
    put(at.row(scratch, GATE + at.FINE, CONFIG), fine)


@triton.jit
def gate_products(GATE: tl.constexpr, LAG: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Multiply a gate between tokens, after `keep_logs`.

    Args:
        GATE: Place of the gate in scratch memory.
        LAG: 0 for the state after the reading token's own write, 1 for the state before it.

    Returns:
        Products from after token `s` to token `t - LAG`, `[t, s]`, 0 where `s` is later; and those from the piece's
        first token to `t - LAG`, `[t]`.
    """
    rows = at.numbers(scratch, CONFIG)
    last, C = rows - LAG, CONFIG.rows
    coarse, fine = scratch + (GATE + at.COARSE) * C, scratch + (GATE + at.FINE) * C
    to_coarse = tl.load(coarse + last, mask=last >= 0, other=0.0)
    to_fine = tl.load(fine + last, mask=last >= 0, other=0.0)
    log = (to_coarse[:, None] - tl.load(coarse + rows)[None, :]) + (to_fine[:, None] - tl.load(fine + rows)[None, :])
    return tl.where(last[:, None] >= rows[None, :], tl.exp2(log), 0.0), tl.exp2(to_coarse + to_fine)


@triton.jit
def products_to_end(GATE: tl.constexpr, size, scratch, CONFIG: tl.constexpr):
    """Multiply a gate from after each token to the piece's last one, `[C]`, and over all tokens, after `keep_logs`."""
    C: tl.constexpr = CONFIG.rows
    coarse, fine = scratch + (GATE + at.COARSE) * C, scratch + (GATE + at.FINE) * C
    all_coarse, all_fine = tl.load(coarse + C - 1), tl.load(fine + C - 1)
    rows = at.numbers(scratch, CONFIG)
    products = tl.exp2((all_coarse - tl.load(coarse + rows)) + (all_fine - tl.load(fine + rows)))
    return tl.where(rows < size, products, 0.0), tl.exp2(all_coarse + all_fine)


@triton.jit
def gate_gradient(of_reads, of_writes, to_end, of_all, gate, LAG: tl.constexpr, CONFIG: tl.constexpr):
    """Turn gradients of products of a gate, each multiplied with its product, into that of the gate's log `[C]`.

    Args:
        of_reads: Sums over all products that end `LAG` tokens before a token.
        of_writes: Sums over those that begin after a token.
        to_end: That of the product from after a token to the piece's end.
        of_all: That of the product over all tokens.
        gate: The gate.
    """
    log = tl.cumsum(of_reads - of_writes, 0, reverse=True) + (tl.cumsum(to_end, 0) - to_end) + of_all
    if LAG > 0:
        log -= of_reads
    return tl.where(gate >= SMALLEST_GATE, log, 0.0)


@triton.jit
def keep_tables(size, scratch, CONFIG: tl.constexpr):
    """Keep the tables of a piece, and what they say of its end; with momentum, writes are left to `keep_writes`.

    Kept of the state before each token's write, and of the one that is read: what is left of earlier states, of the
    first one, of writes and of the first momentum. What is left of writes is the same where there is no momentum.
    """
    keep_logs(at.ALPHA, scratch, CONFIG)
    kept, start = gate_products(at.ALPHA, 1, scratch, CONFIG)
    retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
    erase, first = products_to_end(at.ALPHA, size, scratch, CONFIG)
    tl.store(at.row(scratch, at.ERASED, CONFIG), erase)
    tl.store(scratch + at.LAST * CONFIG.rows, first)
    keep_erases(kept, start, retention, scratch, CONFIG)
    if not CONFIG.momentum:
        tl.store(at.row(scratch, at.WROTE, CONFIG), erase)
    tl.debug_barrier()


@triton.jit
def keep_erases(kept, start, retention, scratch, CONFIG: tl.constexpr):
    """Keep the products of `alpha`, `kept` and `start`; without momentum as weights of writes too."""
    keep_left(at.KEPT, at.START, kept, start, scratch, CONFIG)
    if not CONFIG.momentum:
        keep_left(at.WRITE, at.PUSHED, kept, start, scratch, CONFIG)
    if CONFIG.reading:
        rows = at.numbers(scratch, CONFIG)
        kept = retention[:, None] * kept + tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
        keep_left(at.KEPT + CONFIG.reading, at.START + CONFIG.reading, kept, retention * start, scratch, CONFIG)
        if not CONFIG.momentum:
            keep_left(at.WRITE + CONFIG.reading, at.PUSHED + CONFIG.reading, kept, retention * start, scratch, CONFIG)


@triton.jit
def keep_writes(size, scratch, CONFIG: tl.constexpr):
    """Keep what is left of writes by way of momentum, and of the first momentum, after `keep_tables`."""
    keep_logs(at.MU, scratch, CONFIG)
    rows, erase = tl.arange(0, CONFIG.rows), tl.load(at.row(scratch, at.ERASED, CONFIG))
    chain, from_start = gate_products(at.MU, 0, scratch, CONFIG)
    link, momentum_decay = products_to_end(at.MU, size, scratch, CONFIG)
    last = scratch + at.LAST * CONFIG.rows
    tl.store(at.row(scratch, at.LINK, CONFIG), link)
    tl.store(at.row(scratch, at.WROTE, CONFIG), tl.sum(erase[:, None] * chain, 0))
    tl.store(last + 1 + 0 * rows, tl.cumsum(erase * from_start, 0), mask=rows == CONFIG.rows - 1)
    tl.store(last + 2, momentum_decay)
    kept = tl.load(at.table(scratch, at.KEPT, CONFIG))
    push = tl.sum(kept * from_start[None, :], 1)
    write = multiply_exactly(kept, chain, CONFIG)
    keep_left(at.WRITE, at.PUSHED, write, push, scratch, CONFIG)
    if CONFIG.reading:
        retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
        write, push = retention[:, None] * write + chain, retention * push + from_start
        keep_left(at.WRITE + CONFIG.reading, at.PUSHED + CONFIG.reading, write, push, scratch, CONFIG)
    tl.debug_barrier()


@triton.jit
def keep_left(TABLE: tl.constexpr, ROW: tl.constexpr, table, row, scratch, CONFIG: tl.constexpr):
    """Keep a table and a row of numbers."""
    tl.store(at.table(scratch, TABLE, CONFIG), table)
    tl.store(at.row(scratch, ROW, CONFIG), row)


@triton.jit
def keep_inverse(lower, INDEX: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Keep the inverse of `I + lower`, each row times its learning rate.

    `lower` is strictly lower triangular with `2 ** CONFIG.doublings` rows.

    Inverts diagonal blocks of 1, 2, 4, ... rows, two joining into one. All that appears on the way is part of such an
    inverse, which stays bounded where the powers of `lower` do not. A step of Newton's, with an exact residual, takes
    away what `bf16` products have rounded on the way.
    """
    rows = at.numbers(scratch, CONFIG)
    columns = tl.arange(0, CONFIG.rows)
    apart, place = rows[:, None] ^ columns[None, :], at.table(scratch, INDEX, CONFIG)
    lower = -lower
    inverse = tl.where(apart == 0, 1.0, 0.0) + tl.where(apart == 1, lower, 0.0)
    if CONFIG.precision == "bf16":
        exact = lower
        lower = exact.to(tl.bfloat16)
        put(place, exact - lower.to(tl.float32))
    for level in range(1, CONFIG.doublings):
        # Blocks of `half` rows are inverted, and their products stay apart: what joins two of them is taken.
        half, rows = 1 << level, at.numbers(scratch + level, CONFIG)
        joined = multiply(inverse, multiply(lower, inverse, CONFIG), CONFIG)
        inverse += tl.where(((rows ^ half)[:, None] ^ columns[None, :]) < half, joined, 0.0)
    if CONFIG.precision == "bf16":
        residual = tl.where(rows[:, None] > columns[None, :], -inverse, 0.0)  # the diagonal is 1
        high = inverse.to(tl.bfloat16)
        residual = tl.dot(lower, (inverse - high.to(tl.float32)).to(tl.bfloat16), residual)
        residual = tl.dot(lower, high, residual)
        residual = tl.dot(tl.load(place).to(tl.bfloat16), high, residual)
        inverse = multiply(inverse, residual, CONFIG, inverse)
    put(place, tl.load(at.row(scratch, at.RATE, CONFIG))[:, None] * inverse)
