"""What memories answer, and what they write for keys and values, at the weights that a chunk begins with.

`memory` counts vector memories from 0, and gate memories from 0. `state` points to a packed set of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, ask, ask_back, load_rows, put, sigmoid, slope

NORM_EPS = tl.constexpr(1e-6)
"""Of `l2_norm`."""


@triton.jit
def layer_at(state, memory, LAYER: tl.constexpr):
    """Point to a memory's layer in a packed set of weights."""
    return state + LAYER.begin + memory * LAYER.step


@triton.jit
def ask_first(x, exists, state, memory, scratch, KIND: tl.constexpr, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Keep the hidden numbers with which an MLP memory answers tokens `x` `[C, D]`; `BACK` with what SiLU took."""
    pre = ask(x, exists, layer_at(state, memory, KIND.first), KIND.first, CONFIG)
    if BACK:
        put(at.whole(scratch, at.OF_KEY, CONFIG.hidden, CONFIG), pre)
    put(at.whole(scratch, at.HIDDEN, CONFIG.hidden, CONFIG), pre * sigmoid(pre))


@triton.jit
def answer(x, exists, state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Answer tokens `x` `[C, D]`, after `ask_first`; a gate memory answers in the first of its columns."""
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    if CONFIG.mlp:
        hidden = at.matrix(scratch, at.HIDDEN, CONFIG)
        answers = ask(hidden, exists, layer_at(state, memory, SECOND), SECOND, CONFIG)
        if not KIND.narrow:
            answers += load_rows(x, exists, CONFIG.dim)
    else:
        answers = ask(x, exists, layer_at(state, memory, FIRST), FIRST, CONFIG)
    return answers


@triton.jit
def retrieve(x, exists, state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Ask a memory with tokens `x` `[C, D]`: `ask_first` and `answer`."""
    if CONFIG.mlp:
        ask_first(x, exists, state, memory, scratch, KIND, False, CONFIG)
    return answer(x, exists, state, memory, scratch, KIND, CONFIG)


@triton.jit
def make(x, exists, state, scratch, MEMORY: tl.constexpr, SLOT: tl.constexpr, CONFIG: tl.constexpr):
    """Keep keys, values or queries that a memory makes of the stream `x`: its answers, of unit length."""
    if MEMORY >= 0:
        VECTORS: tl.constexpr = CONFIG.vectors
        answers = retrieve(x, exists, state, MEMORY, scratch, VECTORS, CONFIG)
        length = tl.rsqrt(tl.sum(answers * answers, 1) + NORM_EPS)
        put(at.whole(scratch, SLOT, CONFIG.dim, CONFIG), answers * length[:, None])


@triton.jit
def make_gate(stream, k, exists, state, scratch, MEMORY: tl.constexpr, CONFIG: tl.constexpr):
    """Return `sigmoid` of a gate's logits `[C]`, to which a memory adds its answer to the stream of keys."""
    logit = tl.load(stream + tl.arange(0, CONFIG.rows), mask=exists, other=0.0)
    if MEMORY >= 0:
        GATES: tl.constexpr = CONFIG.gates
        logit += tl.sum(retrieve(k, exists, state, MEMORY, scratch, GATES, CONFIG), 1)
    return tl.sigmoid(logit)


@triton.jit
def gates_at(logits, first, CONFIG: tl.constexpr):
    """Point to a token's logits of the gates; to those of `eta` where a gate is not there."""
    eta, alpha, mu = logits
    eta += first
    retention, push_retention = eta, eta
    if CONFIG.retention:
        retention = alpha + first
    if CONFIG.momentum:
        push_retention = mu + first
    return eta, retention, push_retention


@triton.jit
def streams_at(streams, first, CONFIG: tl.constexpr):
    """Point to a token's inputs of keys, values and queries."""
    begin = first * CONFIG.dim
    return streams[0] + begin, streams[1] + begin, streams[2] + begin


@triton.jit
def tokens_at(streams, first, scratch, CONFIG: tl.constexpr):
    """Point to keys, values and queries of the piece that begins with a token: inputs, or what memories made."""
    k, v, q = streams_at(streams, first, CONFIG)
    if CONFIG.memory_k >= 0:
        k = at.matrix(scratch, at.K, CONFIG)
    if CONFIG.memory_v >= 0:
        v = at.matrix(scratch, at.V, CONFIG)
    if CONFIG.memory_q >= 0:
        q = at.matrix(scratch, at.Q, CONFIG)
    return k, v, q


@triton.jit
def make_tokens(streams, exists, state, scratch, CONFIG: tl.constexpr):
    """Keep keys, values and queries of a piece where memories make them."""
    make(streams[0], exists, state, scratch, CONFIG.memory_k, at.K, CONFIG)
    make(streams[1], exists, state, scratch, CONFIG.memory_v, at.V, CONFIG)
    make(streams[2], exists, state, scratch, CONFIG.memory_q, at.Q, CONFIG)


@triton.jit
def make_gates(logits, k, exists, state, scratch, CONFIG: tl.constexpr):
    """Keep `eta`, `alpha` and `mu`, such that tokens that do not exist change nothing."""
    eta, alpha, mu = logits
    rate = CONFIG.spec.eta_max * make_gate(eta, k, exists, state, scratch, CONFIG.memory_eta, CONFIG)
    put(at.row(scratch, at.RATE, CONFIG), tl.where(exists, rate, 0.0))
    retention = tl.full(rate.shape, 1.0, tl.float32)
    if CONFIG.retention:
        retention = tl.where(exists, make_gate(alpha, k, exists, state, scratch, CONFIG.memory_alpha, CONFIG), 1.0)
    put(at.row(scratch, at.ALPHA, CONFIG), retention)
    if CONFIG.momentum:
        push_retention = make_gate(mu, k, exists, state, scratch, -1, CONFIG)
        put(at.row(scratch, at.MU, CONFIG), tl.where(exists, push_retention, 1.0))


@triton.jit
def square_of(error, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Return squared norms of errors: `[C, 1]`, or `[C, N]` of linear gate memories, which lie side by side."""
    square = error * error
    if CONFIG.mlp or not KIND.narrow:
        square = tl.sum(square, 1)[:, None]
    return square + 1e-12


@triton.jit
def cap(error, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Limit the norm of errors `[C, N]`."""
    if CONFIG.spec.error_cap is not None:
        error *= tl.minimum(CONFIG.spec.error_cap * tl.rsqrt(square_of(error, KIND, CONFIG)), 1.0)
    return error


@triton.jit
def offset_error(error, k, v, exists, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Add to errors what vector memories err by whatever their second layers are."""
    if not KIND.narrow:
        error -= load_rows(v, exists, CONFIG.dim)
        if CONFIG.spec.objective == "l2":
            error += load_rows(k, exists, CONFIG.dim)
    return error


@triton.jit
def freshness(scratch, CONFIG: tl.constexpr):
    """Return what part of errors enters `[C, 1]`: with momentum that averages, what earlier writes do not repeat."""
    C: tl.constexpr = CONFIG.rows
    part = tl.full((C, 1), 1.0, tl.float32)
    if CONFIG.averaged:
        part -= at.column(scratch, at.MU, CONFIG)
    return part


@triton.jit
def length_written(norm, CONFIG: tl.constexpr):
    """Return the length with which second layers are written under keys that were `norm` long."""
    if CONFIG.spec.normalize_writes:
        norm = tl.where(norm > 1, 1 / norm, norm)
    return norm


@triton.jit
def push_square(push):
    """Return squared lengths of what is pushed `[C, 1]`, not 0."""
    return tl.maximum(tl.sum(push * push, 1), 1e-30)[:, None]


@triton.jit
def shrink(first, push):
    """Return factors `[C, 1]` that make writes of first layers smaller where they amplify what is pushed."""
    gain = tl.sum(first * first, 1)[:, None] / push_square(push)
    return 1 / tl.maximum(gain, 1.0)


@triton.jit
def write(k, v, exists, state, memory, scratch, KIND: tl.constexpr, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Compute what a memory writes, for the way `BACK` with what that asks for.

    Kept are keys of its second layer, and what that is written.

    Returns:
        What is written to its first layer, `[C, N]`, and the norm of errors `[C]`.
    """
    if CONFIG.mlp:
        written, surprise = write_mlp(k, v, exists, state, memory, scratch, KIND, BACK, CONFIG)
    else:
        written, surprise = write_linear(k, v, exists, state, memory, scratch, KIND, BACK, CONFIG)
    return written, surprise


@triton.jit
def write_linear(k, v, exists, state, memory, scratch, KIND: tl.constexpr, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Do what `write` does for a linear memory, which has one layer."""
    FIRST: tl.constexpr = KIND.first
    N: tl.constexpr = FIRST.outputs
    first = layer_at(state, memory, FIRST)
    error = -ask(v, exists, first, FIRST, CONFIG) if CONFIG.spec.own_target else -load_rows(v, exists, N)
    if CONFIG.spec.objective == "l2":
        error = ask(k, exists, first, FIRST, CONFIG, error)
    if BACK and (CONFIG.averaged or CONFIG.spec.error_cap is not None):
        put(at.whole(scratch, at.RAW, N, CONFIG), error)
    error = cap(error, KIND, CONFIG)
    written = -(at.column(scratch, at.RATE, CONFIG) * freshness(scratch, CONFIG)) * error
    return written, tl.sqrt(tl.sum(error * error, 1))


@triton.jit
def write_mlp(k, v, exists, state, memory, scratch, KIND: tl.constexpr, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Do what `write` does for an MLP memory."""
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    L2: tl.constexpr = CONFIG.spec.objective == "l2"
    N: tl.constexpr = SECOND.outputs
    E: tl.constexpr = CONFIG.hidden
    C: tl.constexpr = CONFIG.rows
    first, second = layer_at(state, memory, FIRST), layer_at(state, memory, SECOND)
    pre = ask(k, exists, first, FIRST, CONFIG)
    put(at.whole(scratch, at.OF_KEY, E, CONFIG), pre)
    hidden = pre * sigmoid(pre)
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + CONFIG.spec.key_eps)[:, None]
    put(at.whole(scratch, at.KEYS, E, CONFIG), hidden * (1 / norm))
    error = tl.zeros((C, N), tl.float32)
    if L2 or CONFIG.spec.own_target:
        put(at.whole(scratch, at.HIDDEN, E, CONFIG), hidden if L2 else tl.zeros((C, E), tl.float32))
        if CONFIG.spec.own_target:
            pre = ask(v, exists, first, FIRST, CONFIG)
            add(at.whole(scratch, at.HIDDEN, E, CONFIG), -pre * sigmoid(pre))
            if BACK:
                put(at.whole(scratch, at.OF_VALUE, E, CONFIG), pre)
        error = ask(at.matrix(scratch, at.HIDDEN, CONFIG), exists, second, SECOND, CONFIG)
    error = offset_error(error, k, v, exists, KIND, CONFIG)
    if BACK and (CONFIG.averaged or CONFIG.spec.error_cap is not None):
        put(at.whole(scratch, at.RAW, N, CONFIG), error)
    error = cap(error, KIND, CONFIG)
    push, rate = error * freshness(scratch, CONFIG), at.column(scratch, at.RATE, CONFIG)
    put(at.whole(scratch, at.PUSH, N, CONFIG), push)
    put(at.whole(scratch, at.SECOND, N, CONFIG), -rate * length_written(norm, CONFIG) * push)
    back = ask_back(at.matrix(scratch, at.PUSH, CONFIG), exists, second, SECOND, CONFIG)
    if BACK:
        put(at.whole(scratch, at.BACK, E, CONFIG), back)
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    gate = sigmoid(pre)
    written = -back * slope(gate, pre * gate)
    if CONFIG.spec.normalize_writes:
        rate *= shrink(written, push)
    return rate * written, tl.sqrt(tl.sum(error * error, 1))
