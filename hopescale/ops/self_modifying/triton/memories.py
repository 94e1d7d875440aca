"""What memories answer, and what they write for keys and values, at the weights that a chunk begins with.

`memory` counts wide memories from 0, and narrow ones from 0. `state` points to a packed set of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, slope, times

NORM_EPS = tl.constexpr(1e-6)
"""Of `l2_norm`."""


@triton.jit
def first_layer(memory, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Return where a memory's first layer begins in a packed set of weights; its rows are `PLAN.columns` apart."""
    offset = memory * PLAN.hidden
    if NARROW:
        offset = PLAN.wide * PLAN.hidden + memory * PLAN.narrow_width
    return offset


@triton.jit
def second_layer(memory, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Return where a memory's second layer begins; its rows lie side by side."""
    offset = PLAN.second + memory * PLAN.hidden * PLAN.dim
    if NARROW:
        offset = PLAN.second + PLAN.wide * PLAN.hidden * PLAN.dim + memory * PLAN.hidden * PLAN.narrow_columns
    return offset


@triton.jit
def ask(x, exists, state, memory, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Ask a memory with tokens `x` `[C, D]`; a narrow one answers in the first of its columns."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    first = state + first_layer(memory, NARROW, PLAN)
    if PLAN.mlp:
        pre = times(x, exists, first, PLAN.columns, 1, PLAN.dim, PLAN.hidden, PLAN)
        put(at.whole(scratch, at.HIDDEN, PLAN.hidden, PLAN), pre * tl.sigmoid(pre))
        second = state + second_layer(memory, NARROW, PLAN)
        answer = times(at.matrix(scratch, at.HIDDEN, PLAN), exists, second, N, 1, PLAN.hidden, N, PLAN)
        if not NARROW:
            answer += load_rows(x, exists, PLAN.dim)
    else:
        answer = times(x, exists, first, PLAN.columns, 1, PLAN.dim, N, PLAN)
    return answer


@triton.jit
def make(x, exists, state, scratch, MEMORY: tl.constexpr, SLOT: tl.constexpr, PLAN: tl.constexpr):
    """Return where keys, values or queries lie: the stream `x` itself, or a memory's answers to it of unit length."""
    made = x
    if MEMORY >= 0:
        made = at.matrix(scratch, SLOT, PLAN)
        answer = ask(x, exists, state, MEMORY, scratch, False, PLAN)
        length = tl.rsqrt(tl.sum(answer * answer, 1) + NORM_EPS)
        put(at.whole(scratch, SLOT, PLAN.dim, PLAN), answer * length[:, None])
    return made


@triton.jit
def make_gate(stream, k, exists, state, scratch, MEMORY: tl.constexpr, PLAN: tl.constexpr):
    """Return `sigmoid` of a gate's logits `[C]`, to which a memory adds its answer to the stream of keys."""
    logit = tl.load(stream + tl.arange(0, PLAN.rows), mask=exists, other=0.0)
    if MEMORY >= 0:
        logit += tl.sum(ask(k, exists, state, MEMORY, scratch, True, PLAN), 1)
    return tl.sigmoid(logit)


@triton.jit
def gates_at(eta, alpha, mu, first, PLAN: tl.constexpr):
    """Point to a token's logits of the gates; to those of `eta` where a gate is not there."""
    eta += first
    retention, push_retention = eta, eta
    if PLAN.retention:
        retention = alpha + first
    if PLAN.momentum:
        push_retention = mu + first
    return eta, retention, push_retention


@triton.jit
def make_tokens(streams, exists, state, scratch, PLAN: tl.constexpr):
    """Point to keys, values and queries of a piece, made from what `streams` point to."""
    k = make(streams[0], exists, state, scratch, PLAN.made_k, at.K, PLAN)
    v = make(streams[1], exists, state, scratch, PLAN.made_v, at.V, PLAN)
    return k, v, make(streams[2], exists, state, scratch, PLAN.made_q, at.Q, PLAN)


@triton.jit
def make_gates(logits, k, exists, state, scratch, PLAN: tl.constexpr):
    """Keep `eta`, `alpha` and `mu`, such that tokens that do not exist change nothing; return `alpha` `[C]`."""
    eta, alpha, mu = logits
    rate = PLAN.eta_max * make_gate(eta, k, exists, state, scratch, PLAN.made_eta, PLAN)
    put(at.row(scratch, at.RATE, PLAN), tl.where(exists, rate, 0.0))
    retention = tl.full(rate.shape, 1.0, tl.float32)
    if PLAN.retention:
        retention = tl.where(exists, make_gate(alpha, k, exists, state, scratch, PLAN.made_alpha, PLAN), 1.0)
    put(at.row(scratch, at.ALPHA, PLAN), retention)
    if PLAN.momentum:
        push_retention = make_gate(mu, k, exists, state, scratch, -1, PLAN)
        put(at.row(scratch, at.MU, PLAN), tl.where(exists, push_retention, 1.0))
    return retention


@triton.jit
def cap(error, PLAN: tl.constexpr):
    """Limit the norm of errors `[C, N]`."""
    if PLAN.error_cap is not None:
        error *= tl.minimum(PLAN.error_cap * tl.rsqrt(tl.sum(error * error, 1) + 1e-12), 1.0)[:, None]
    return error


@triton.jit
def offset_error(error, k, v, exists, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Add to errors what wide memories err by whatever their second layers are."""
    if not NARROW:
        error -= load_rows(v, exists, PLAN.dim)
        if PLAN.l2:
            error += load_rows(k, exists, PLAN.dim)
    return error


@triton.jit
def freshen(error, scratch, PLAN: tl.constexpr):
    """Scale errors `[C, N]` to what enters: with momentum, what is not repeated from earlier writes."""
    if PLAN.momentum:
        error *= 1 - at.column(scratch, at.MU, PLAN)
    return error


@triton.jit
def write(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, PLAN: tl.constexpr):
    """Keep what a memory writes, and keys of its second layer; with `KEEP` what the backward kernel asks for, too.

    Returns:
        The norm of errors `[C]`.
    """
    if PLAN.mlp:
        surprise = write_mlp(k, v, exists, state, memory, scratch, NARROW, KEEP, PLAN)
    else:
        surprise = write_linear(k, v, exists, state, memory, scratch, NARROW, KEEP, PLAN)
    return surprise


@triton.jit
def write_linear(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, PLAN: tl.constexpr):
    """Do what `write` does for a linear memory, which has one layer."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    first = state + first_layer(memory, NARROW, PLAN)
    if PLAN.own_target:
        error = -times(v, exists, first, PLAN.columns, 1, PLAN.dim, N, PLAN)
    else:
        error = -load_rows(v, exists, N)
    if PLAN.l2:
        error += times(k, exists, first, PLAN.columns, 1, PLAN.dim, N, PLAN)
    if KEEP:
        put(at.whole(scratch, at.RAW, N, PLAN), error)
    error = cap(error, PLAN)
    put(at.whole(scratch, at.VALUES, N, PLAN), -freshen(error, scratch, PLAN))
    return tl.sqrt(tl.sum(error * error, 1))


@triton.jit
def write_mlp(k, v, exists, state, memory, scratch, NARROW: tl.constexpr, KEEP: tl.constexpr, PLAN: tl.constexpr):
    """Do what `write` does for an MLP memory."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    E: tl.constexpr = PLAN.hidden
    C: tl.constexpr = PLAN.rows
    first, second = state + first_layer(memory, NARROW, PLAN), state + second_layer(memory, NARROW, PLAN)
    pre = times(k, exists, first, PLAN.columns, 1, PLAN.dim, E, PLAN)
    put(at.whole(scratch, at.OF_KEY, E, PLAN), pre)
    hidden = pre * tl.sigmoid(pre)
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + PLAN.key_eps)[:, None]
    put(at.whole(scratch, at.KEYS, E, PLAN), hidden / norm)
    error = tl.zeros((C, N), tl.float32)
    if PLAN.l2 or PLAN.own_target:
        put(at.whole(scratch, at.HIDDEN, E, PLAN), hidden if PLAN.l2 else tl.zeros((C, E), tl.float32))
        if PLAN.own_target:
            pre = times(v, exists, first, PLAN.columns, 1, PLAN.dim, E, PLAN)
            add(at.whole(scratch, at.HIDDEN, E, PLAN), -pre * tl.sigmoid(pre))
            if KEEP:
                put(at.whole(scratch, at.OF_VALUE, E, PLAN), pre)
        error += times(at.matrix(scratch, at.HIDDEN, PLAN), exists, second, N, 1, E, N, PLAN)
    error = offset_error(error, k, v, exists, NARROW, PLAN)
    if KEEP:
        put(at.whole(scratch, at.RAW, N, PLAN), error)
    error = cap(error, PLAN)
    push = freshen(error, scratch, PLAN)
    put(at.whole(scratch, at.PUSH, N, PLAN), push)
    put(at.whole(scratch, at.SECOND, N, PLAN), -norm * push)
    back = times(at.matrix(scratch, at.PUSH, PLAN), exists, second, 1, N, N, E, PLAN)
    if KEEP:
        put(at.whole(scratch, at.BACK, E, PLAN), back)
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, PLAN))
    gate = tl.sigmoid(pre)
    put(at.whole(scratch, at.VALUES, E, PLAN), -back * slope(gate, pre * gate))
    return tl.sqrt(tl.sum(error * error, 1))
