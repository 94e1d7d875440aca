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
def gate_products(GATE: tl.constexpr, LAG: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Multiply a gate between tokens.

    Args:
        GATE: Place of the gate in scratch memory.
        LAG: 0 for the state after the reading token's own write, 1 for the state before it.

    Returns:
        Products from after token `s` to token `t - LAG`, `[t, s]`, 0 where `s` is later; and those from the piece's
        first token to `t - LAG`, `[t]`.
    """
    rows = at.numbers(scratch, CONFIG)
    last = rows - LAG
    coarse, fine = summed_logs(tl.load(at.row(scratch, GATE, CONFIG)))
    to_coarse, to_fine = coarse, fine
    if LAG > 0:
        to_coarse, to_fine = summed_logs(tl.load(scratch + GATE * CONFIG.rows + last, mask=last >= 0, other=1.0))
    log = (to_coarse[:, None] - coarse[None, :]) + (to_fine[:, None] - fine[None, :])
    return tl.where(last[:, None] >= rows[None, :], tl.exp2(log), 0.0), tl.exp2(to_coarse + to_fine)


@triton.jit
def products_to_end(GATE: tl.constexpr, size, scratch, CONFIG: tl.constexpr):
    """Multiply a gate from after each token to the piece's last one, `[C]`, and over all tokens."""
    coarse, fine = summed_logs(tl.load(at.row(scratch, GATE, CONFIG)))
    all_coarse, all_fine = tl.min(coarse, 0), tl.max(fine, 0)  # the sums at the end: they never rise, and never fall
    products = tl.exp2((all_coarse - coarse) + (all_fine - fine))
    return tl.where(at.numbers(scratch, CONFIG) < size, products, 0.0), tl.exp2(all_coarse + all_fine)


@triton.jit
def gate_gradient(of_reads, of_writes, of_all, gate, LAG: tl.constexpr, CONFIG: tl.constexpr):
    """Turn gradients of products of a gate, each multiplied with its product, into that of the gate's log `[C]`.

    Args:
        of_reads: Sums over all products that end `LAG` tokens before a token.
        of_writes: Sums over those that begin after a token.
        of_all: Sum over those that end with the piece.
        gate: The gate.
    """
    log = tl.cumsum(of_reads - of_writes, 0, reverse=True) + of_all
    if LAG > 0:
        log -= of_reads
    return tl.where(gate >= SMALLEST_GATE, log, 0.0)


@triton.jit
def decay_weights(scratch, CONFIG: tl.constexpr):
    """Compute what the state before each token's write is made of.

    Returns:
        `kept` and `start`, the products of `alpha`; `chain` and `from_start`, those of `mu` after each write; `write`
        and `push`, the weights of writes and of the first momentum. Without momentum the last four repeat the first.
    """
    kept, start = gate_products(at.ALPHA, 1, scratch, CONFIG)
    chain, from_start, write, push = kept, start, kept, start
    if CONFIG.momentum:
        chain, from_start = gate_products(at.MU, 0, scratch, CONFIG)
        write = multiply_exactly(kept, chain, CONFIG)
        push = tl.sum(kept * from_start[None, :], 1)
    return kept, start, chain, from_start, write, push


@triton.jit
def reading_tables(decay, retention, scratch, CONFIG: tl.constexpr):
    """Return `kept`, `start`, `write` and `push` of the states after writes; `retention` is `alpha` `[C]`."""
    kept, start, chain, from_start, write, push = decay
    rows = at.numbers(scratch, CONFIG)
    kept = retention[:, None] * kept + tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    start = retention * start
    write = retention[:, None] * write + chain if CONFIG.momentum else kept
    push = retention * push + from_start if CONFIG.momentum else start
    return kept, start, write, push


@triton.jit
def last_weights(decay, size, scratch, CONFIG: tl.constexpr):
    """Weigh what enters the state and the momentum after the piece's last token.

    Returns:
        Weights in the state of erases `[C]`, the first state, writes `[C]` and the first momentum; in the momentum, of
        writes `[C]` and the first momentum. Without momentum, those of writes are those of erases.
    """
    erase, first = products_to_end(at.ALPHA, size, scratch, CONFIG)
    wrote, pushed, link, momentum_decay = erase, first, erase, first
    if CONFIG.momentum:
        link, momentum_decay = products_to_end(at.MU, size, scratch, CONFIG)
        wrote, pushed = tl.sum(erase[:, None] * decay[2], 0), tl.sum(erase * decay[3], 0)
    return erase, first, wrote, pushed, link, momentum_decay


@triton.jit
def gates_back(decay, d_decay, size, scratch, CONFIG: tl.constexpr):
    """Turn the gradients of a piece's tables, and of its end, into those of the logs of `alpha` and `mu`, each `[C]`.

    Args:
        decay: Result of `decay_weights`.
        d_decay: Gradients of that, without what follows from the piece's end.
    """
    kept, start, chain, from_start, write, push = decay
    d_kept, d_start, d_chain, d_from_start, d_write, d_push = d_decay
    erase, first = products_to_end(at.ALPHA, size, scratch, CONFIG)
    last = scratch + at.D_LAST * CONFIG.rows
    d_first, d_pushed, d_momentum_decay = tl.load(last), tl.load(last + 1), tl.load(last + 2)
    d_erase, d_wrote = tl.load(at.row(scratch, at.D_ERASED, CONFIG)), tl.load(at.row(scratch, at.D_WROTE, CONFIG))
    d_mu = d_erase
    if CONFIG.momentum:
        d_erase += tl.sum(chain * d_wrote[None, :], 1) + d_pushed * from_start
        d_chain += erase[:, None] * d_wrote[None, :] + multiply(tl.trans(kept), d_write, CONFIG)
        d_from_start += d_pushed * erase + tl.sum(kept * d_push[:, None], 0)
        d_kept += multiply(d_write, tl.trans(chain), CONFIG) + d_push[:, None] * from_start[None, :]
        link, momentum_decay = products_to_end(at.MU, size, scratch, CONFIG)
        links = link * tl.load(at.row(scratch, at.D_LINK, CONFIG))
        spanning, gate = d_chain * chain, tl.load(at.row(scratch, at.MU, CONFIG))
        of_all = tl.sum(links, 0) + d_momentum_decay * momentum_decay
        of_reads = tl.sum(spanning, 1) + d_from_start * from_start
        d_mu = gate_gradient(of_reads, tl.sum(spanning, 0) + links, of_all, gate, 0, CONFIG)
    else:
        d_erase += d_wrote  # writes and erases weigh the same
    spanning, gate, erases = d_kept * kept, tl.load(at.row(scratch, at.ALPHA, CONFIG)), erase * d_erase
    of_all = tl.sum(erases, 0) + d_first * first
    of_reads = tl.sum(spanning, 1) + d_start * start
    return gate_gradient(of_reads, tl.sum(spanning, 0) + erases, of_all, gate, 1, CONFIG), d_mu


@triton.jit
def keep_inverse(lower, INDEX: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Keep the inverse of `I + lower`, each row times its learning rate.

    `lower` is strictly lower triangular with `2 ** CONFIG.doublings` rows.

    Inverts diagonal blocks of 1, 2, 4, ... rows, two joining into one. All that appears on the way is part of such an
    inverse, which stays bounded where the powers of `lower` do not. A step of Newton's, with an exact residual, takes
    away what `bf16` products have rounded on the way.
    """
    rows, columns = at.numbers(scratch, CONFIG), tl.arange(0, CONFIG.rows)
    apart, place = rows[:, None] ^ columns[None, :], at.table(scratch, INDEX, CONFIG)
    lower = -lower
    put(place, lower)
    inverse = tl.where(apart == 0, 1.0, 0.0) + tl.where(apart == 1, lower, 0.0)
    if CONFIG.precision == "bf16":
        lower = lower.to(tl.bfloat16)
    for level in range(1, CONFIG.doublings):
        # Blocks of `half` rows are inverted, and their products stay apart: what joins two of them is taken.
        half, rows = 1 << level, at.numbers(scratch + level, CONFIG)
        joined = multiply(inverse, multiply(lower, inverse, CONFIG), CONFIG)
        inverse += tl.where(((rows ^ half)[:, None] ^ columns[None, :]) < half, joined, 0.0)
    if CONFIG.precision == "bf16":
        residual = tl.where(apart == 0, 1.0, 0.0) - inverse
        residual = multiply_exactly(tl.load(place), inverse, CONFIG, residual)
        inverse = multiply(inverse, residual, CONFIG, inverse)
    put(place, tl.load(at.row(scratch, at.RATE, CONFIG))[:, None] * inverse)
