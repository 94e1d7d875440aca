"""The way back through `memories.py`: to weights at the chunk's start, to keys, values, queries and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, add_outer, put, slope, times
from hopescale.ops.self_modifying.triton.memories import NORM_EPS, ask, cap, first_layer, freshen, second_layer


@triton.jit
def ask_back(x, exists, gradient, state, d_state, memory, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Move the gradient `[C, N]` of what `ask` answered to its weights, and return that of `x`."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    E: tl.constexpr = PLAN.hidden if PLAN.mlp else N
    temporary = at.matrix(scratch, at.TEMPORARY, PLAN)
    first = first_layer(memory, NARROW, PLAN)
    d_pre = gradient
    if PLAN.mlp:
        second, hidden = second_layer(memory, NARROW, PLAN), at.matrix(scratch, at.HIDDEN, PLAN)
        pre = times(x, exists, state + first, PLAN.columns, 1, PLAN.dim, E, PLAN)
        gate = tl.sigmoid(pre)
        put(at.whole(scratch, at.HIDDEN, E, PLAN), pre * gate)
        put(at.whole(scratch, at.TEMPORARY, N, PLAN), gradient)
        add_outer(d_state + second, N, hidden, exists, gradient, E, N, PLAN)
        d_pre = times(temporary, exists, state + second, 1, N, N, E, PLAN) * slope(gate, pre * gate)
    put(at.whole(scratch, at.TEMPORARY, E, PLAN), d_pre)
    add_outer(d_state + first, PLAN.columns, x, exists, d_pre, PLAN.dim, E, PLAN)
    d_x = times(temporary, exists, state + first, 1, PLAN.columns, E, PLAN.dim, PLAN)
    if PLAN.mlp and not NARROW:
        d_x += gradient
    return d_x


@triton.jit
def make_back(x, exists, state, d_state, scratch, MEMORY: tl.constexpr, GRADIENT: tl.constexpr, PLAN: tl.constexpr):
    """Return the gradient of a stream `x` from that of what was made from it, kept as `GRADIENT`."""
    d_x = tl.load(at.whole(scratch, GRADIENT, PLAN.dim, PLAN))
    if MEMORY >= 0:
        answer = ask(x, exists, state, MEMORY, scratch, False, PLAN)
        length = tl.rsqrt(tl.sum(answer * answer, 1) + NORM_EPS)[:, None]
        made = answer * length
        d_answer = length * (d_x - made * tl.sum(made * d_x, 1)[:, None])
        d_x = ask_back(x, exists, d_answer, state, d_state, MEMORY, scratch, False, PLAN)
    return d_x


@triton.jit
def make_gate_back(d_logit, k, exists, state, d_state, pointer, scratch, MEMORY: tl.constexpr, PLAN: tl.constexpr):
    """Store the gradient of a gate's logits, and add to that of the stream of keys."""
    tl.store(pointer + tl.arange(0, PLAN.rows), d_logit, mask=exists)
    if MEMORY >= 0:
        d_answer = tl.where(tl.arange(0, PLAN.narrow_columns)[None, :] == 0, d_logit[:, None], 0.0)
        d_k = ask_back(k, exists, d_answer, state, d_state, MEMORY, scratch, True, PLAN)
        add(at.whole(scratch, at.D_K, PLAN.dim, PLAN), d_k)


@triton.jit
def cap_back(raw, gradient, PLAN: tl.constexpr):
    """Move a gradient through `cap`."""
    if PLAN.error_cap is not None:
        square = tl.sum(raw * raw, 1)[:, None] + 1e-12
        scale = PLAN.error_cap * tl.rsqrt(square)
        along = raw * (tl.sum(raw * gradient, 1)[:, None] / square)
        gradient = tl.where(scale < 1, scale * (gradient - along), gradient)
    return gradient


@triton.jit
def error_back(d_push, scratch, N: tl.constexpr, PLAN: tl.constexpr):
    """Move the gradient of what is pushed to the errors, before they were capped."""
    raw = tl.load(at.whole(scratch, at.RAW, N, PLAN))
    if PLAN.momentum:
        at.add_row(scratch, at.D_FRESH, tl.sum(d_push * cap(raw, PLAN), 1), PLAN)
        d_push = freshen(d_push, scratch, PLAN)
    return cap_back(raw, d_push, PLAN)


@triton.jit
def through_first(x, exists, d_pre, state, d_state, offset, scratch, D_X: tl.constexpr, E: tl.constexpr, PLAN):
    """Move the gradient `[C, E]` of what a first layer answers to `x` to its weights, and add it to that of `x`."""
    put(at.whole(scratch, at.TEMPORARY, E, PLAN), d_pre)
    add_outer(d_state + offset, PLAN.columns, x, exists, d_pre, PLAN.dim, E, PLAN)
    temporary = at.matrix(scratch, at.TEMPORARY, PLAN)
    d_x = times(temporary, exists, state + offset, 1, PLAN.columns, E, PLAN.dim, PLAN)
    add(at.whole(scratch, D_X, PLAN.dim, PLAN), d_x)


@triton.jit
def write_linear_back(k, v, exists, state, d_state, memory, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Move the gradient of a linear memory's write values to its weights, keys and values."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    offset = first_layer(memory, NARROW, PLAN)
    d_error = error_back(-tl.load(at.whole(scratch, at.D_VALUES, N, PLAN)), scratch, N, PLAN)
    if PLAN.l2:
        through_first(k, exists, d_error, state, d_state, offset, scratch, at.D_K, N, PLAN)
    if PLAN.own_target:
        through_first(v, exists, -d_error, state, d_state, offset, scratch, at.D_V, N, PLAN)
    else:
        add(at.whole(scratch, at.D_V, N, PLAN), -d_error)


@triton.jit
def write_mlp_back(k, v, exists, state, d_state, memory, scratch, NARROW: tl.constexpr, PLAN: tl.constexpr):
    """Move the gradients of an MLP memory's write values and second keys to its weights, keys and values."""
    N: tl.constexpr = PLAN.narrow_columns if NARROW else PLAN.dim
    E: tl.constexpr = PLAN.hidden
    first, second = first_layer(memory, NARROW, PLAN), second_layer(memory, NARROW, PLAN)
    temporary = at.matrix(scratch, at.TEMPORARY, PLAN)
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, PLAN))
    gate = tl.sigmoid(pre)
    hidden = pre * gate
    d_values = tl.load(at.whole(scratch, at.D_VALUES, E, PLAN))
    d_second = tl.load(at.whole(scratch, at.D_SECOND, N, PLAN))
    put(at.whole(scratch, at.TEMPORARY, E, PLAN), -d_values * slope(gate, hidden))
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + PLAN.key_eps)[:, None]
    d_push = times(temporary, exists, state + second, N, 1, E, N, PLAN) - norm * d_second
    push, keys = tl.load(at.whole(scratch, at.PUSH, N, PLAN)), tl.load(at.whole(scratch, at.KEYS, E, PLAN))
    add_outer(d_state + second, N, temporary, exists, push, E, N, PLAN)
    d_keys = tl.load(at.whole(scratch, at.D_KEYS, E, PLAN))
    d_norm = -tl.sum(push * d_second, 1)[:, None] - tl.sum(d_keys * keys, 1)[:, None] / norm
    d_hidden = d_keys / norm + d_norm * keys
    d_error = error_back(d_push, scratch, N, PLAN)
    if not NARROW:
        add(at.whole(scratch, at.D_V, N, PLAN), -d_error)
        if PLAN.l2:
            add(at.whole(scratch, at.D_K, N, PLAN), d_error)
    if PLAN.l2 or PLAN.own_target:
        add_outer(d_state + second, N, at.matrix(scratch, at.HIDDEN, PLAN), exists, d_error, E, N, PLAN)
        put(at.whole(scratch, at.TEMPORARY, N, PLAN), d_error)
        d_asked = times(temporary, exists, state + second, 1, N, N, E, PLAN)
        if PLAN.l2:
            d_hidden += d_asked
        if PLAN.own_target:
            of_value = tl.load(at.whole(scratch, at.OF_VALUE, E, PLAN))
            open_ = tl.sigmoid(of_value)
            d_pre = -d_asked * slope(open_, of_value * open_)
            through_first(v, exists, d_pre, state, d_state, first, scratch, at.D_V, E, PLAN)
    bend = gate * (1 - gate) * (2 + pre * (1 - 2 * gate))  # the derivative of `slope`
    d_pre = d_hidden * slope(gate, hidden) - bend * tl.load(at.whole(scratch, at.BACK, E, PLAN)) * d_values
    through_first(k, exists, d_pre, state, d_state, first, scratch, at.D_K, E, PLAN)
