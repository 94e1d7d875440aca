"""What memories answer, and what they write for keys and values, at the weights that a chunk begins with.

`memory` counts vector memories from 0, and gate memories from 0. `state` points to a packed set of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, slope, times

NORM_EPS = tl.constexpr(1e-6)
"""Of `l2_norm`."""


@triton.jit
def first_layer(memory, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Return where a memory's first layer begins in a packed set of weights; its rows are `CONFIG.columns` apart."""
    offset = memory * CONFIG.hidden
    if NARROW:
        offset = CONFIG.vector_memories * CONFIG.hidden + memory * CONFIG.narrow_width
    return offset


@triton.jit
def second_layer(memory, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Return where a memory's second layer begins; its rows lie side by side."""
    offset = CONFIG.second + memory * CONFIG.hidden * CONFIG.dim
    if NARROW:
        offset = (
            CONFIG.second
            + CONFIG.vector_memories * CONFIG.hidden * CONFIG.dim
            + memory * CONFIG.hidden * CONFIG.narrow_columns
        )
    return offset


@triton.jit
def retrieve(x, exists, state, memory, scratch, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Ask a memory with tokens `x` `[C, D]`; a gate memory answers in the first of its columns."""
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    first = state + first_layer(memory, NARROW, CONFIG)
    if CONFIG.mlp:
        pre = times(x, exists, first, CONFIG.columns, 1, CONFIG.dim, CONFIG.hidden, CONFIG)
        put(at.whole(scratch, at.HIDDEN, CONFIG.hidden, CONFIG), pre * tl.sigmoid(pre))
        second = state + second_layer(memory, NARROW, CONFIG)
        answer = times(at.matrix(scratch, at.HIDDEN, CONFIG), exists, second, N, 1, CONFIG.hidden, N, CONFIG)
        if not NARROW:
            answer += load_rows(x, exists, CONFIG.dim)
    else:
        answer = times(x, exists, first, CONFIG.columns, 1, CONFIG.dim, N, CONFIG)
    return answer


@triton.jit
def make(x, exists, state, scratch, MEMORY: tl.constexpr, SLOT: tl.constexpr, CONFIG: tl.constexpr):
    """Return where keys, values or queries lie: the stream `x` itself, or a memory's answers to it of unit length."""
    output = x
    if MEMORY >= 0:
        output = at.matrix(scratch, SLOT, CONFIG)
        answer = retrieve(x, exists, state, MEMORY, scratch, False, CONFIG)
        length = tl.rsqrt(tl.sum(answer * answer, 1) + NORM_EPS)
        put(at.whole(scratch, SLOT, CONFIG.dim, CONFIG), answer * length[:, None])
    return output


@triton.jit
def make_gate(stream, k, exists, state, scratch, MEMORY: tl.constexpr, CONFIG: tl.constexpr):
    """Return `sigmoid` of a gate's logits `[C]`, to which a memory adds its answer to the stream of keys."""
    logit = tl.load(stream + tl.arange(0, CONFIG.rows), mask=exists, other=0.0)
    if MEMORY >= 0:
        logit += tl.sum(retrieve(k, exists, state, MEMORY, scratch, True, CONFIG), 1)
    return tl.sigmoid(logit)


@triton.jit
def gates_at(eta, alpha, mu, first, CONFIG: tl.constexpr):
    """Point to a token's logits of the gates; to those of `eta` where a gate is not there."""
    eta += first
    retention, push_retention = eta, eta
    if CONFIG.retention:
        retention = alpha + first
    if CONFIG.momentum:
        push_retention = mu + first
    return eta, retention, push_retention


@triton.jit
def make_tokens(streams, exists, state, scratch, CONFIG: tl.constexpr):
    """Point to keys, values and queries of a piece, made from what `streams` point to."""
    k = make(streams[0], exists, state, scratch, CONFIG.memory_k, at.K, CONFIG)
    v = make(streams[1], exists, state, scratch, CONFIG.memory_v, at.V, CONFIG)
    return k, v, make(streams[2], exists, state, scratch, CONFIG.memory_q, at.Q, CONFIG)


@triton.jit
def make_gates(logits, k, exists, state, scratch, CONFIG: tl.constexpr):
    """Keep `eta`, `alpha` and `mu`, such that tokens that do not exist change nothing; return `alpha` `[C]`."""
    eta, alpha, mu = logits
    rate = CONFIG.eta_max * make_gate(eta, k, exists, state, scratch, CONFIG.memory_eta, CONFIG)
    put(at.row(scratch, at.RATE, CONFIG), tl.where(exists, rate, 0.0))
    retention = tl.full(rate.shape, 1.0, tl.float32)
    if CONFIG.retention:
        retention = tl.where(exists, make_gate(alpha, k, exists, state, scratch, CONFIG.memory_alpha, CONFIG), 1.0)
    put(at.row(scratch, at.ALPHA, CONFIG), retention)
    if CONFIG.momentum:
        push_retention = make_gate(mu, k, exists, state, scratch, -1, CONFIG)
        put(at.row(scratch, at.MU, CONFIG), tl.where(exists, push_retention, 1.0))
    return retention


@triton.jit
def cap(error, CONFIG: tl.constexpr):
    """Limit the norm of errors `[C, N]`."""
    if CONFIG.error_cap is not None:
        error *= tl.minimum(CONFIG.error_cap * tl.rsqrt(tl.sum(error * error, 1) + 1e-12), 1.0)[:, None]
    return error


@triton.jit
def offset_error(error, k, v, exists, NARROW: tl.constexpr, CONFIG: tl.constexpr):
    """Add to errors what vector memories err by whatever their second layers are."""
    if not NARROW:
        error -= load_rows(v, exists, CONFIG.dim)
        if CONFIG.l2:
            error += load_rows(k, exists, CONFIG.dim)
    return error


@triton.jit
def freshen(error, scratch, CONFIG: tl.constexpr):
    """Scale errors `[C, N]` to what enters: with momentum, what is not repeated from earlier writes."""
    if CONFIG.momentum:
        error *= 1 - at.column(scratch, at.MU, CONFIG)
    return error


@triton.jit
def write(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what a memory writes, and keys of its second layer; with `KEEP` what the backward kernel asks for, too.

    Returns:
        The norm of errors `[C]`.
    """
    if CONFIG.mlp:
        surprise = write_mlp(k, v, exists, state, memory, scratch, NARROW, KEEP, CONFIG)
    else:
        surprise = write_linear(k, v, exists, state, memory, scratch, NARROW, KEEP, CONFIG)
    return surprise


@triton.jit
def write_linear(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, CONFIG: tl.constexpr):
    """Do what `write` does for a linear memory, which has one layer."""
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    first = state + first_layer(memory, NARROW, CONFIG)
    if CONFIG.own_target:
        error = -times(v, exists, first, CONFIG.columns, 1, CONFIG.dim, N, CONFIG)
    else:
        error = -load_rows(v, exists, N)
    if CONFIG.l2:
        error += times(k, exists, first, CONFIG.columns, 1, CONFIG.dim, N, CONFIG)
    if KEEP:
        put(at.whole(scratch, at.RAW, N, CONFIG), error)
    error = cap(error, CONFIG)
    put(at.whole(scratch, at.VALUES, N, CONFIG), -freshen(error, scratch, CONFIG))
    return tl.sqrt(tl.sum(error * error, 1))


@triton.jit
def write_mlp(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, CONFIG: tl.constexpr):
    """Do what `write` does for an MLP memory."""
    N: tl.constexpr = CONFIG.narrow_columns if NARROW else CONFIG.dim
    E: tl.constexpr = CONFIG.hidden
    C: tl.constexpr = CONFIG.rows
    first, second = state + first_layer(memory, NARROW, CONFIG), state + second_layer(memory, NARROW, CONFIG)
    pre = times(k, exists, first, CONFIG.columns, 1, CONFIG.dim, E, CONFIG)
    put(at.whole(scratch, at.OF_KEY, E, CONFIG), pre)
    hidden = pre * tl.sigmoid(pre)
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + CONFIG.key_eps)[:, None]
    put(at.whole(scratch, at.KEYS, E, CONFIG), hidden / norm)
    error = tl.zeros((C, N), tl.float32)
    if CONFIG.l2 or CONFIG.own_target:
        put(at.whole(scratch, at.HIDDEN, E, CONFIG), hidden if CONFIG.l2 else tl.zeros((C, E), tl.float32))
        if CONFIG.own_target:
            pre = times(v, exists, first, CONFIG.columns, 1, CONFIG.dim, E, CONFIG)
            add(at.whole(scratch, at.HIDDEN, E, CONFIG), -pre * tl.sigmoid(pre))
            if KEEP:
                put(at.whole(scratch, at.OF_VALUE, E, CONFIG), pre)
        error += times(at.matrix(scratch, at.HIDDEN, CONFIG), exists, second, N, 1, E, N, CONFIG)
    error = offset_error(error, k, v, exists, NARROW, CONFIG)
    if KEEP:
        put(at.whole(scratch, at.RAW, N, CONFIG), error)
    error = cap(error, CONFIG)
    push = freshen(error, scratch, CONFIG)
    put(at.whole(scratch, at.PUSH, N, CONFIG), push)
    put(at.whole(scratch, at.SECOND, N, CONFIG), -norm * push)
    back = times(at.matrix(scratch, at.PUSH, CONFIG), exists, second, 1, N, N, E, CONFIG)
    if KEEP:
        put(at.whole(scratch, at.BACK, E, CONFIG), back)
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    gate = tl.sigmoid(pre)
    put(at.whole(scratch, at.VALUES, E, CONFIG), -back * slope(gate, pre * gate))
    return tl.sqrt(tl.sum(error * error, 1))
