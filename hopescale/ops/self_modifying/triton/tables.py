"""The tables of a piece of a chunk, from its gates alone, and the inverse of a triangular one.

Tables are `[C, C]`: rows are reading tokens, columns writing tokens. The learning rate of a write stands beside its
value, so that all of them are products of gates. Tokens that do not exist have a learning rate of 0 and gates of 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at

SMALLEST_GATE = tl.constexpr(2.0**-126)
"""Smallest normal float32: gates below it count as this."""


@triton.jit
def gate_products(GATE: tl.constexpr, LAG: tl.constexpr, size, scratch, CONFIG: tl.constexpr):
    """Multiply a gate between tokens, by summing its logs from the writing token on.

    Args:
        GATE: Place of the gate in scratch memory.
        LAG: 0 for the state after the reading token's own write, 1 for the state before it.

    Returns:
        Products from after token `s` to token `t - LAG`, `[t, s]`, 0 where `s` is later; and those from the piece's
        first token to `t - LAG`, `[t]`.
    """
    rows = tl.arange(0, CONFIG.rows)
    last = rows - LAG
    gate = tl.load(scratch + GATE * CONFIG.rows + last, mask=(last >= 0) & (last < size), other=1.0)
    log = tl.log(tl.maximum(gate, SMALLEST_GATE))
    steps = tl.where(last[:, None] > rows[None, :], log[:, None], 0.0)
    between = tl.where(last[:, None] >= rows[None, :], tl.exp(tl.cumsum(steps, 0)), 0.0)
    return between, tl.exp(tl.cumsum(log, 0))


@triton.jit
def gate_gradient(between, start, gate, LAG: tl.constexpr, CONFIG: tl.constexpr):
    """Turn the gradients of `gate_products`, each multiplied with its product, into the gradient of the gate."""
    rows = tl.arange(0, CONFIG.rows)
    earlier = tl.where(rows[:, None] < rows[None, :], 1.0, 0.0)
    spanning = tl.dot(between, earlier, input_precision=CONFIG.precision) + start[:, None]
    log = tl.sum(tl.where(rows[:, None] - LAG >= rows[None, :], spanning, 0.0), 0)
    return tl.where(gate >= SMALLEST_GATE, log / tl.maximum(gate, SMALLEST_GATE), 0.0)


@triton.jit
def decay_weights(size, scratch, CONFIG: tl.constexpr):
    """Compute what the state before each token's write is made of.

    Returns:
        `kept` and `start`, the products of `alpha`; `chain` and `from_start`, those of `mu` after each write; `write`
        and `push`, the weights of writes and of the first momentum. Without momentum the last four repeat the first.
    """
    kept, start = gate_products(at.ALPHA, 1, size, scratch, CONFIG)
    chain, from_start, write, push = kept, start, kept, start
    if CONFIG.momentum:
        chain, from_start = gate_products(at.MU, 0, size, scratch, CONFIG)
        write = tl.dot(kept, chain, input_precision=CONFIG.precision)
        push = tl.sum(kept * from_start[None, :], 1)
    return kept, start, chain, from_start, write, push


@triton.jit
def reading_tables(decay, retention, CONFIG: tl.constexpr):
    """Return `kept`, `start`, `write` and `push` of the state that each token reads; `retention` is `alpha` `[C]`."""
    kept, start, chain, from_start, write, push = decay
    if CONFIG.spec.read == "inclusive":
        rows = tl.arange(0, CONFIG.rows)
        kept = retention[:, None] * kept + tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
        start = retention * start
        write = retention[:, None] * write + chain if CONFIG.momentum else kept
        push = retention * push + from_start if CONFIG.momentum else start
    return kept, start, write, push


@triton.jit
def last_weights(decay, retention, size, CONFIG: tl.constexpr):
    """Weigh what enters the state and the momentum after the piece's last token.

    Returns:
        Weights in the state of erases `[C]`, the first state, writes `[C]` and the first momentum; in the momentum, of
        writes `[C]` and the first momentum. Without momentum, those of writes are those of erases.
    """
    kept, start, chain, from_start, write, push = decay
    last = tl.where(tl.arange(0, CONFIG.rows) == size - 1, 1.0, 0.0)
    gate = last * retention
    erase = tl.sum(gate[:, None] * kept, 0) + last
    first = tl.sum(gate * start, 0)
    wrote, pushed, link, momentum_decay = erase, first, erase, first
    if CONFIG.momentum:
        link = tl.sum(last[:, None] * chain, 0)
        momentum_decay = tl.sum(last * from_start, 0)
        wrote = tl.sum(gate[:, None] * write, 0) + link
        pushed = tl.sum(gate * push, 0) + momentum_decay
    return erase, first, wrote, pushed, link, momentum_decay


@triton.jit
def gates_back(decay, before, after, d_link, d_momentum_decay, retention, push_retention, CONFIG: tl.constexpr):
    """Turn the gradients of a piece's tables into those of `alpha` and `mu`, each `[C]`.

    Args:
        decay: Result of `decay_weights`.
        before: Gradients of `kept`, `start`, `write` and `push` of the state before each token's write.
        after: Gradients of the same of the state after it.
        d_link: Gradient of `chain` beyond that, `[C, C]`.
        d_momentum_decay: Gradient of `from_start` beyond that, `[C]`.
        retention: `alpha` `[C]`.
        push_retention: `mu` `[C]`; unused without momentum.
    """
    kept, start, chain, from_start, write, push = decay
    d_alpha = tl.sum(after[0] * kept, 1) + after[1] * start
    d_kept, d_start = before[0] + retention[:, None] * after[0], before[1] + retention * after[1]
    d_mu = d_alpha
    if CONFIG.momentum:
        d_alpha += tl.sum(after[2] * write, 1) + after[3] * push
        d_write, d_push = before[2] + retention[:, None] * after[2], before[3] + retention * after[3]
        d_chain = after[2] + d_link + tl.dot(tl.trans(kept), d_write, input_precision=CONFIG.precision)
        d_from_start = after[3] + d_momentum_decay + tl.sum(kept * d_push[:, None], 0)
        d_mu = gate_gradient(d_chain * chain, d_from_start * from_start, push_retention, 0, CONFIG)
        d_kept += tl.dot(d_write, tl.trans(chain), input_precision=CONFIG.precision)
        d_kept += d_push[:, None] * from_start[None, :]
    d_alpha += gate_gradient(d_kept * kept, d_start * start, retention, 1, CONFIG)
    return d_alpha, d_mu


@triton.jit
def unit_inverse(lower, CONFIG: tl.constexpr):
    """Invert `I + lower`, `lower` strictly lower triangular with `2 ** CONFIG.doublings` rows.

    Inverts diagonal blocks of 1, 2, 4, ... rows, two joining into one. All that appears on the way is part of such an
    inverse, which stays bounded where the powers of `lower` do not.
    """
    rows = tl.arange(0, CONFIG.rows)
    apart = rows[:, None] ^ rows[None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, lower, 0.0)
    for level in range(1, CONFIG.doublings):
        joining = tl.where((apart >> level) == 1, lower, 0.0)
        joining = tl.dot(joining, inverse, input_precision=CONFIG.precision)
        inverse -= tl.dot(inverse, joining, input_precision=CONFIG.precision)
    return inverse
