"""Parts that the kernels share: loads, the tables of a chunk, and the inverse of a triangular matrix.

`rows` counts the tokens of a chunk, `size` of which exist. Tokens beyond them have keys, queries, values and `eta` of 0
and gates of 1, so that they add nothing. Tables are `[C, C]`: rows are reading tokens, columns writing tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST_GATE = tl.constexpr(2.0**-126)
"""Smallest normal float32: gates below it count as this."""


@triton.jit
def locate(rows, tokens, heads, chunk):
    """Find this program's chunk: program 0 counts chunks, 1 heads of all sequences.

    Returns:
        The index of token and head `[C]`, which tokens exist `[C]`, their number, and the index of the chunk.
    """
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    size = tl.minimum(chunk, tokens - n * chunk)
    at = (head // heads * tokens + n * chunk + rows) * heads + head % heads
    return at, rows < size, size, head * tl.num_programs(0) + n


@triton.jit
def load_tokens(pointer, at, exists, columns, WIDTH: tl.constexpr):
    """Load some columns of a chunk's tokens `[C, columns]` as float32; `at` is the index of token and head."""
    return tl.load(pointer + at[:, None] * WIDTH + columns[None, :], mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tokens(pointer, at, exists, columns, values, WIDTH: tl.constexpr):
    """Undo `load_tokens`, in the type of the pointer."""
    tl.store(pointer + at[:, None] * WIDTH + columns[None, :], values, mask=exists[:, None])


@triton.jit
def load_gate(pointer, at, exists, otherwise):
    """Load one number per token as float32."""
    return tl.load(pointer + at, mask=exists, other=otherwise).to(tl.float32)


@triton.jit
def gate_products(pointer, at, stride, rows, size, LAG: tl.constexpr):
    """Multiply a gate between tokens, by summing its logs from the writing token on.

    Args:
        stride: Distance from one token's gate to the next.
        LAG: 0 for the state after the reading token's own write, 1 for the state before it.

    Returns:
        Products from after token `s` to token `t - LAG`, `[t, s]`, 0 where `s` is later; and those from the chunk's
        first token to `t - LAG`, `[t]`.
    """
    last = rows - LAG
    gate = tl.load(pointer + at - LAG * stride, mask=(last >= 0) & (last < size), other=1.0).to(tl.float32)
    log = tl.log(tl.maximum(gate, SMALLEST_GATE))
    steps = tl.where(last[:, None] > rows[None, :], log[:, None], 0.0)
    between = tl.where(last[:, None] >= rows[None, :], tl.exp(tl.cumsum(steps, 0)), 0.0)
    return between, tl.exp(tl.cumsum(log, 0))


@triton.jit
def gate_gradient(between, start, gate, rows, LAG: tl.constexpr, PRECISION: tl.constexpr):
    """Turn the gradients of `gate_products`, each multiplied with its product, into the gradient of the gate."""
    earlier = tl.where(rows[:, None] < rows[None, :], 1.0, 0.0)
    spanning = tl.dot(between, earlier, input_precision=PRECISION) + start[:, None]
    log = tl.sum(tl.where(rows[:, None] - LAG >= rows[None, :], spanning, 0.0), 0)
    return tl.where(gate >= SMALLEST_GATE, log / tl.maximum(gate, SMALLEST_GATE), 0.0)


@triton.jit
def similarities(a, b, at, exists, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply a chunk's rows of `a` and of `b`, each of width `D`, with one another: `[C, C]`."""
    products = tl.zeros((at.shape[0], at.shape[0]), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        right = tl.trans(load_tokens(b, at, exists, d, D))
        products += tl.dot(load_tokens(a, at, exists, d, D), right, input_precision=PRECISION)
    return products


@triton.jit
def answers(x, at, exists, state, rows, D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Ask some rows of the matrix `state` with a chunk's rows of `x`: `[C, rows]`."""
    answer = tl.zeros((at.shape[0], rows.shape[0]), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        weights = tl.load(state + d[:, None] + rows[None, :] * D)
        answer += tl.dot(load_tokens(x, at, exists, d, D), weights, input_precision=PRECISION)
    return answer


@triton.jit
def decay_weights(alpha, mu, at, stride, rows, size, PRECISION: tl.constexpr):
    """Compute what the state before each token's write is made of, without `eta`.

    Returns:
        `alpha_products` and `start`, the products of `alpha`; `chain` and `from_start`, those of `mu` after each write;
        `write` and `push`, the weights of writes and of the first momentum. The last four repeat the first without
        `mu`.
    """
    alpha_products, start = gate_products(alpha, at, stride, rows, size, 1)
    chain, from_start, write, push = alpha_products, start, alpha_products, start
    if mu is not None:
        chain, from_start = gate_products(mu, at, stride, rows, size, 0)
        write = tl.dot(alpha_products, chain, input_precision=PRECISION)
        push = tl.sum(alpha_products * from_start[None, :], 1)
    return alpha_products, start, chain, from_start, write, push


@triton.jit
def reading_tables(decay, retention, rows, READ: tl.constexpr, MOMENTUM: tl.constexpr):
    """Return `kept`, `start`, `write` and `push` of the state that each token reads; `retention` is `alpha` `[C]`."""
    kept, start, chain, from_start, write, push = decay
    if READ == "inclusive":
        kept = retention[:, None] * kept + tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
        start = retention * start
        write = retention[:, None] * write + chain if MOMENTUM else kept
        push = retention * push + from_start if MOMENTUM else start
    if READ == "boundary":
        kept, start, write, push = 0.0 * kept, tl.full(start.shape, 1.0, tl.float32), 0.0 * write, 0.0 * push
    return kept, start, write, push


@triton.jit
def last_weights(decay, retention, rows, size, MOMENTUM: tl.constexpr):
    """Weigh what enters the state and the momentum after the chunk's last token.

    Args:
        decay: Result of `decay_weights`.
        retention: `alpha` `[C]`.

    Returns:
        Weights in the state of erases `[C]`, the first state, writes `[C]` and the first momentum; in the momentum, of
        writes `[C]` and the first momentum. Without momentum, those of writes are those of erases.
    """
    kept, start, chain, from_start, write, push = decay
    last = tl.where(rows == size - 1, 1.0, 0.0)
    gate = last * retention
    erase = tl.sum(gate[:, None] * kept, 0) + last
    first = tl.sum(gate * start, 0)
    wrote, pushed, link, momentum_decay = erase, first, erase, first
    if MOMENTUM:
        link = tl.sum(last[:, None] * chain, 0)
        momentum_decay = tl.sum(last * from_start, 0)
        wrote = tl.sum(gate[:, None] * write, 0) + link
        pushed = tl.sum(gate * push, 0) + momentum_decay
    return erase, first, wrote, pushed, link, momentum_decay


@triton.jit
def unit_inverse(lower, rows, DOUBLINGS: tl.constexpr, PRECISION: tl.constexpr):
    """Invert `I + lower`, `lower` strictly lower triangular with `2 ** DOUBLINGS` rows.

    Inverts diagonal blocks of 1, 2, 4, ... rows, two joining into one. All that appears on the way is part of such an
    inverse, which stays bounded where the powers of `lower` do not.
    """
    apart = rows[:, None] ^ rows[None, :]
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, lower, 0.0)
    for level in range(1, DOUBLINGS):
        joining = tl.where((apart >> level) == 1, lower, 0.0)
        joining = tl.dot(joining, inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, joining, input_precision=PRECISION)
    return inverse
