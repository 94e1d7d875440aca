"""The way back through `memories.py`: to weights at the chunk's start, to keys, values, queries and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, add_outer, ask, ask_back, outer, put, sigmoid, slope
from hopescale.ops.self_modifying.triton.memories import (
    NORM_EPS,
    cap,
    freshness,
    layer_at,
    length_written,
    push_square,
    retrieve,
    shrink,
    square_of,
)


@triton.jit
def retrieve_back(x, exists, gradient, state, d_state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient `[C, N]` of what `retrieve` answered to its weights, and return that of `x`."""
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    temporary, d_pre = at.matrix(scratch, at.TEMPORARY, CONFIG), gradient
    first = layer_at(state, memory, FIRST)
    if CONFIG.mlp:
        hidden = at.matrix(scratch, at.HIDDEN, CONFIG)
        pre = ask(x, exists, first, FIRST, CONFIG)
        gate = sigmoid(pre)
        put(at.whole(scratch, at.HIDDEN, CONFIG.hidden, CONFIG), pre * gate)
        put(at.whole(scratch, at.TEMPORARY, SECOND.outputs, CONFIG), gradient)
        add_outer(layer_at(d_state, memory, SECOND), hidden, exists, gradient, SECOND, CONFIG)
        d_pre = ask_back(temporary, exists, layer_at(state, memory, SECOND), SECOND, CONFIG) * slope(gate, pre * gate)
    put(at.whole(scratch, at.TEMPORARY, FIRST.outputs, CONFIG), d_pre)
    add_outer(layer_at(d_state, memory, FIRST), x, exists, d_pre, FIRST, CONFIG)
    d_x = ask_back(temporary, exists, first, FIRST, CONFIG)
    if CONFIG.mlp and not KIND.narrow:
        d_x += gradient
    return d_x


@triton.jit
def make_back(x, exists, state, d_state, scratch, MEMORY: tl.constexpr, GRADIENT: tl.constexpr, CONFIG: tl.constexpr):
    """Return the gradient of a stream `x` from that of what was made from it, kept as `GRADIENT`."""
    d_x = tl.load(at.whole(scratch, GRADIENT, CONFIG.dim, CONFIG))
    if MEMORY >= 0:
        VECTORS: tl.constexpr = CONFIG.vectors
        answer = retrieve(x, exists, state, MEMORY, scratch, VECTORS, CONFIG)
        length = tl.rsqrt(tl.sum(answer * answer, 1) + NORM_EPS)[:, None]
        unit = answer * length
        d_answer = length * (d_x - unit * tl.sum(unit * d_x, 1)[:, None])
        d_x = retrieve_back(x, exists, d_answer, state, d_state, MEMORY, scratch, VECTORS, CONFIG)
    return d_x


@triton.jit
def make_gate_back(d_logit, k, exists, state, d_state, pointer, scratch, MEMORY: tl.constexpr, CONFIG: tl.constexpr):
    """Store the gradient of a gate's logits, and add to that of the stream of keys."""
    tl.store(pointer + tl.arange(0, CONFIG.rows), d_logit, mask=exists)
    if MEMORY >= 0:
        GATES: tl.constexpr = CONFIG.gates
        d_answer = tl.where(tl.arange(0, GATES.second.outputs)[None, :] == 0, d_logit[:, None], 0.0)
        d_k = retrieve_back(k, exists, d_answer, state, d_state, MEMORY, scratch, GATES, CONFIG)
        add(at.whole(scratch, at.D_K, CONFIG.dim, CONFIG), d_k)


@triton.jit
def cap_back(raw, gradient, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move a gradient through `cap`."""
    if CONFIG.spec.error_cap is not None:
        square = square_of(raw, KIND, CONFIG)
        scale, along = CONFIG.spec.error_cap * tl.rsqrt(square), raw * gradient
        if CONFIG.mlp or not KIND.narrow:
            along = tl.sum(along, 1)[:, None]
        gradient = tl.where(scale < 1, scale * (gradient - raw * (along / square)), gradient)
    return gradient


@triton.jit
def error_back(d_push, scratch, N: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of what is pushed to the errors, before they were capped."""
    if CONFIG.averaged or CONFIG.spec.error_cap is not None:
        raw = tl.load(at.whole(scratch, at.RAW, N, CONFIG))
        if CONFIG.averaged:
            at.add_row(scratch, at.D_FRESH, tl.sum(d_push * cap(raw, KIND, CONFIG), 1), CONFIG)
            d_push *= freshness(scratch, CONFIG)
        d_push = cap_back(raw, d_push, KIND, CONFIG)
    return d_push


@triton.jit
def through_first(
    x, exists, d_pre, state, d_state, memory, scratch, D_X: tl.constexpr, FIRST: tl.constexpr, CONFIG: tl.constexpr
):
    """Move the gradient of what a first layer answers to `x` to its weights, and add it to that of `x`."""
    put(at.whole(scratch, at.TEMPORARY, FIRST.outputs, CONFIG), d_pre)
    add_outer(layer_at(d_state, memory, FIRST), x, exists, d_pre, FIRST, CONFIG)
    temporary = at.matrix(scratch, at.TEMPORARY, CONFIG)
    d_x = ask_back(temporary, exists, layer_at(state, memory, FIRST), FIRST, CONFIG)
    add(at.whole(scratch, D_X, CONFIG.dim, CONFIG), d_x)


@triton.jit
def write_linear_back(k, v, exists, state, d_state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of a linear memory's write values to its weights, keys and values."""
    FIRST: tl.constexpr = KIND.first
    N: tl.constexpr = FIRST.outputs
    K: tl.constexpr = FIRST.inputs
    L2: tl.constexpr = CONFIG.spec.objective == "l2"
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    d_error = error_back(-tl.load(at.whole(scratch, at.D_VALUES, N, CONFIG)), scratch, N, KIND, CONFIG)
    if not CONFIG.spec.own_target:
        add(at.whole(scratch, at.D_V, N, CONFIG), -d_error)
    if L2 or CONFIG.spec.own_target:
        put(at.whole(scratch, at.TEMPORARY, N, CONFIG), d_error)
        for first in range(0, K, BLOCK):
            k_ = first + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, N), tl.float32)
            if CONFIG.spec.own_target:
                total = outer(v, exists, -d_error, k_, K, CONFIG, total)
            if L2:
                total = outer(k, exists, d_error, k_, K, CONFIG, total)
            add(layer_at(d_state, memory, FIRST) + k_[:, None] * FIRST.row + tl.arange(0, N)[None, :], total)
        temporary = at.matrix(scratch, at.TEMPORARY, CONFIG)
        d_x = ask_back(temporary, exists, layer_at(state, memory, FIRST), FIRST, CONFIG)
        if L2:
            add(at.whole(scratch, at.D_K, K, CONFIG), d_x)
        if CONFIG.spec.own_target:
            add(at.whole(scratch, at.D_V, K, CONFIG), -d_x)


@triton.jit
def shrink_back(d_values, gate, hidden, push, scratch, CONFIG: tl.constexpr):
    """Move the gradient of a first layer's writes to them before they were made smaller.

    Returns:
        It, and the factor on what is pushed that is the gradient of that, as far as it decides how much smaller.
    """
    before = -tl.load(at.whole(scratch, at.BACK, CONFIG.hidden, CONFIG)) * slope(gate, hidden)
    scale = shrink(before, push)
    along = tl.sum(d_values * before, 1)[:, None]
    over = tl.where(scale < 1, 2 * along * scale / push_square(push), 0.0)
    return scale * (d_values - over * before), over


@triton.jit
def write_mlp_back(k, v, exists, state, d_state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradients of an MLP memory's write values and second keys to its weights, keys and values."""
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    L2: tl.constexpr = CONFIG.spec.objective == "l2"
    N: tl.constexpr = SECOND.outputs
    E: tl.constexpr = CONFIG.hidden
    second, d_second_layer = layer_at(state, memory, SECOND), layer_at(d_state, memory, SECOND)
    temporary = at.matrix(scratch, at.TEMPORARY, CONFIG)
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    gate = sigmoid(pre)
    hidden = pre * gate
    d_values = tl.load(at.whole(scratch, at.D_VALUES, E, CONFIG))
    d_second = tl.load(at.whole(scratch, at.D_SECOND, N, CONFIG))
    push, keys = tl.load(at.whole(scratch, at.PUSH, N, CONFIG)), tl.load(at.whole(scratch, at.KEYS, E, CONFIG))
    if CONFIG.spec.normalize_writes:
        d_values, over = shrink_back(d_values, gate, hidden, push, scratch, CONFIG)
    put(at.whole(scratch, at.TEMPORARY, E, CONFIG), -d_values * slope(gate, hidden))
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + CONFIG.spec.key_eps)[:, None]
    d_push = ask(temporary, exists, second, SECOND, CONFIG) - length_written(norm, CONFIG) * d_second
    if CONFIG.spec.normalize_writes:
        d_push += over * push
    add_outer(d_second_layer, temporary, exists, push, SECOND, CONFIG)
    d_keys = tl.load(at.whole(scratch, at.D_KEYS, E, CONFIG))
    d_norm = -tl.sum(push * d_second, 1)[:, None]
    if CONFIG.spec.normalize_writes:
        d_norm = tl.where(norm > 1, -d_norm / (norm * norm), d_norm)
    d_norm -= tl.sum(d_keys * keys, 1)[:, None] / norm
    d_hidden = d_keys * (1 / norm) + d_norm * keys
    d_error = error_back(d_push, scratch, N, KIND, CONFIG)
    if not KIND.narrow:
        add(at.whole(scratch, at.D_V, N, CONFIG), -d_error)
        if L2:
            add(at.whole(scratch, at.D_K, N, CONFIG), d_error)
    if L2 or CONFIG.spec.own_target:
        add_outer(d_second_layer, at.matrix(scratch, at.HIDDEN, CONFIG), exists, d_error, SECOND, CONFIG)
        put(at.whole(scratch, at.TEMPORARY, N, CONFIG), d_error)
        d_asked = ask_back(temporary, exists, second, SECOND, CONFIG)
        if L2:
            d_hidden += d_asked
        if CONFIG.spec.own_target:
            of_value = tl.load(at.whole(scratch, at.OF_VALUE, E, CONFIG))
            open_ = sigmoid(of_value)
            d_pre = -d_asked * slope(open_, of_value * open_)
            through_first(v, exists, d_pre, state, d_state, memory, scratch, at.D_V, FIRST, CONFIG)
    bend = gate * (1 - gate) * (2 + pre * (1 - 2 * gate))  # the derivative of `slope`
    d_pre = d_hidden * slope(gate, hidden) - bend * tl.load(at.whole(scratch, at.BACK, E, CONFIG)) * d_values
    through_first(k, exists, d_pre, state, d_state, memory, scratch, at.D_K, FIRST, CONFIG)
