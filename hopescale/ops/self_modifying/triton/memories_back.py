"""The way back through `memories.py`: to weights at the chunk's start, to keys, values, queries and gates."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import (
    add,
    add_outer,
    ask,
    ask_back,
    entries,
    load_rows,
    outer,
    put,
    sigmoid,
    slope,
)
from hopescale.ops.self_modifying.triton.memories import (
    NORM_EPS,
    answer,
    ask_first,
    cap,
    freshness,
    layer_at,
    length_written,
    push_square,
    shrink,
    square_of,
    tokens_at,
)


@triton.jit
def retrieve_back(
    x, exists, state, d_state, memory, scratch, TO: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """Move the gradient of what a memory answered to its weights, and add that of the tokens `x` to what lies at `TO`.

    It is kept as `PUSH`, and what `ask_first` has kept is still there. Parts are loops of one turn, as `scratch.again`
    says.
    """
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    D_PRE: tl.constexpr = at.TEMPORARY if CONFIG.mlp else at.PUSH
    if CONFIG.mlp:
        for turn in tl.range(at.opaque(110, scratch), 111, disable_licm=True):
            here = at.again(scratch, turn)
            hidden = at.matrix(here, at.HIDDEN, CONFIG)
            gradient = tl.load(at.whole(here, at.PUSH, SECOND.outputs, CONFIG))
            add_outer(layer_at(d_state, memory, SECOND), hidden, exists, gradient, SECOND, CONFIG)
        for turn in tl.range(at.opaque(111, scratch), 112, disable_licm=True):
            here = at.again(scratch, turn)
            second = layer_at(state, memory, SECOND)
            d_hidden = ask_back(at.matrix(here, at.PUSH, CONFIG), exists, second, SECOND, CONFIG)
            pre = tl.load(at.whole(here, at.OF_KEY, CONFIG.hidden, CONFIG))
            gate = sigmoid(pre)
            put(at.whole(here, at.TEMPORARY, CONFIG.hidden, CONFIG), d_hidden * slope(gate, pre * gate))
    for turn in tl.range(at.opaque(112, scratch), 113, disable_licm=True):
        here = at.again(scratch, turn)
        d_pre = tl.load(at.whole(here, D_PRE, FIRST.outputs, CONFIG))
        add_outer(layer_at(d_state, memory, FIRST), x, exists, d_pre, FIRST, CONFIG)
    for turn in tl.range(at.opaque(113, scratch), 114, disable_licm=True):
        here = at.again(scratch, turn)
        first = layer_at(state, memory, FIRST)
        d_x = ask_back(at.matrix(here, D_PRE, CONFIG), exists, first, FIRST, CONFIG)
        if CONFIG.mlp and not KIND.narrow:
            d_x += tl.load(at.whole(here, at.PUSH, SECOND.outputs, CONFIG))
        add(at.whole(here, TO, CONFIG.dim, CONFIG), d_x)


@triton.jit
def make_back(x, exists, state, d_state, scratch, MEMORY: tl.constexpr, GRADIENT: tl.constexpr, CONFIG: tl.constexpr):
    """Turn the gradient of what was made from a stream `x`, kept as `GRADIENT`, into that of the stream."""
    if MEMORY >= 0:
        VECTORS: tl.constexpr = CONFIG.vectors
        C: tl.constexpr = CONFIG.rows
        D: tl.constexpr = CONFIG.dim
        if CONFIG.mlp:
            for turn in tl.range(at.opaque(114, scratch), 115, disable_licm=True):
                here = at.again(scratch, turn)
                ask_first(x, exists, state, MEMORY, here, VECTORS, True, CONFIG)
        for turn in tl.range(at.opaque(115, scratch), 116, disable_licm=True):
            here = at.again(scratch, turn)
            answers = answer(x, exists, state, MEMORY, here, VECTORS, CONFIG)
            d_unit = tl.load(at.whole(here, GRADIENT, D, CONFIG))
            length = tl.rsqrt(tl.sum(answers * answers, 1) + NORM_EPS)[:, None]
            unit = answers * length
            d_answers = length * (d_unit - unit * tl.sum(unit * d_unit, 1)[:, None])
            put(at.whole(here, at.PUSH, D, CONFIG), d_answers)
            put(at.whole(here, GRADIENT, D, CONFIG), tl.zeros((C, D), tl.float32))
        retrieve_back(x, exists, state, d_state, MEMORY, scratch, GRADIENT, VECTORS, CONFIG)


@triton.jit
def make_gate_back(d_logit, k, exists, state, d_state, pointer, scratch, MEMORY: tl.constexpr, CONFIG: tl.constexpr):
    """Store the gradient of a gate's logits, and add to that of the stream of keys."""
    tl.store(pointer + tl.arange(0, CONFIG.rows), d_logit, mask=exists)
    if MEMORY >= 0:
        GATES: tl.constexpr = CONFIG.gates
        N: tl.constexpr = GATES.second.outputs
        d_answers = tl.where(tl.arange(0, N)[None, :] == 0, d_logit[:, None], 0.0)
        put(at.whole(scratch, at.PUSH, N, CONFIG), d_answers)
        if CONFIG.mlp:
            for turn in tl.range(at.opaque(114, scratch), 115, disable_licm=True):
                here = at.again(scratch, turn)
                ask_first(k, exists, state, MEMORY, here, GATES, True, CONFIG)
        retrieve_back(k, exists, state, d_state, MEMORY, scratch, at.D_K, GATES, CONFIG)


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
def shrink_back(d_values, before, push, scratch, CONFIG: tl.constexpr):
    """Move the gradient of a first layer's writes to what they were `before` they were made smaller.

    Kept is the factor on what is pushed that is the gradient of that, as far as it decides how much smaller.
    """
    scale = shrink(before, push)
    along = tl.sum(d_values * before, 1)[:, None]
    over = tl.where(scale < 1, 2 * along * scale / push_square(push), 0.0)
    put(at.row(scratch, at.OVER, CONFIG), tl.sum(over, 1))
    return scale * (d_values - over * before)


@triton.jit
def values_back(scratch, N: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of a first layer's writes to what they are the slope's multiples of, a temporary matrix."""
    E: tl.constexpr = CONFIG.hidden
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    gate = sigmoid(pre)
    bent = slope(gate, pre * gate)
    d_values = tl.load(at.whole(scratch, at.D_VALUES, E, CONFIG))
    if CONFIG.spec.normalize_writes:
        before = -tl.load(at.whole(scratch, at.BACK, E, CONFIG)) * bent
        d_values = shrink_back(d_values, before, tl.load(at.whole(scratch, at.PUSH, N, CONFIG)), scratch, CONFIG)
        put(at.whole(scratch, at.D_VALUES, E, CONFIG), d_values)
    put(at.whole(scratch, at.TEMPORARY, E, CONFIG), -d_values * bent)


@triton.jit
def second_writes_back(scratch, N: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients of a second layer's writes and keys to what is pushed and to hidden numbers, in their places.

    What first layers say of what is pushed is left to `pushes_back`, but for how much smaller it makes their writes.
    """
    E: tl.constexpr = CONFIG.hidden
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    hidden = pre * sigmoid(pre)
    norm = tl.sqrt(tl.sum(hidden * hidden, 1) + CONFIG.spec.key_eps)[:, None]
    push = tl.load(at.whole(scratch, at.PUSH, N, CONFIG))
    d_second = tl.load(at.whole(scratch, at.D_SECOND, N, CONFIG))
    d_norm = -tl.sum(push * d_second, 1)[:, None]
    d_push = -length_written(norm, CONFIG) * d_second
    if CONFIG.spec.normalize_writes:
        d_norm = tl.where(norm > 1, -d_norm / (norm * norm), d_norm)
        d_push += at.column(scratch, at.OVER, CONFIG) * push
    put(at.whole(scratch, at.D_SECOND, N, CONFIG), d_push)
    d_keys = tl.load(at.whole(scratch, at.D_KEYS, E, CONFIG))
    keys = tl.load(at.whole(scratch, at.KEYS, E, CONFIG))
    d_norm -= tl.sum(d_keys * keys, 1)[:, None] / norm
    put(at.whole(scratch, at.D_KEYS, E, CONFIG), d_keys * (1 / norm) + d_norm * keys)


@triton.jit
def pushes_back(exists, second, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of what is pushed to errors, in its place, and to keys and values as far as they are errors."""
    SECOND: tl.constexpr = KIND.second
    N: tl.constexpr = SECOND.outputs
    d_push = tl.load(at.whole(scratch, at.D_SECOND, N, CONFIG))
    d_push = ask(at.matrix(scratch, at.TEMPORARY, CONFIG), exists, second, SECOND, CONFIG, d_push)
    d_error = error_back(d_push, scratch, N, KIND, CONFIG)
    put(at.whole(scratch, at.D_SECOND, N, CONFIG), d_error)
    if not KIND.narrow:
        add(at.whole(scratch, at.D_V, N, CONFIG), -d_error)
        if CONFIG.spec.objective == "l2":
            add(at.whole(scratch, at.D_K, N, CONFIG), d_error)


@triton.jit
def add_outers(matrix, x, a, y, b, exists, LAYER: tl.constexpr, BOTH: tl.constexpr, CONFIG: tl.constexpr):
    """Add `x^T a`, and `y^T b` if there are both, to the matrix of a layer; all are matrices of tokens in memory."""
    K: tl.constexpr = LAYER.inputs
    N: tl.constexpr = LAYER.outputs
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total = outer(x, exists, load_rows(a, exists, N), k, K, CONFIG)
        if BOTH:
            total = outer(y, exists, load_rows(b, exists, N), k, K, CONFIG, total)
        add(entries(matrix, k, tl.arange(0, N), LAYER.row, 1), total)


@triton.jit
def errors_back(exists, second, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move the gradient of errors to hidden numbers: under keys in its place, under values a temporary matrix."""
    E: tl.constexpr = CONFIG.hidden
    d_hidden = ask_back(at.matrix(scratch, at.D_SECOND, CONFIG), exists, second, LAYER, CONFIG)
    if CONFIG.spec.objective == "l2":
        add(at.whole(scratch, at.D_KEYS, E, CONFIG), d_hidden)
    if CONFIG.spec.own_target:
        of_value = tl.load(at.whole(scratch, at.OF_VALUE, E, CONFIG))
        gate = sigmoid(of_value)
        put(at.whole(scratch, at.TEMPORARY, E, CONFIG), -d_hidden * slope(gate, of_value * gate))


@triton.jit
def hidden_back(scratch, CONFIG: tl.constexpr):
    """Move the gradients of hidden numbers and of slopes to what the first layer answers to keys, kept as `HIDDEN`."""
    E: tl.constexpr = CONFIG.hidden
    pre = tl.load(at.whole(scratch, at.OF_KEY, E, CONFIG))
    gate = sigmoid(pre)
    bend = gate * (1 - gate) * (2 + pre * (1 - 2 * gate))  # the derivative of `slope`
    back, d_values = tl.load(at.whole(scratch, at.BACK, E, CONFIG)), tl.load(at.whole(scratch, at.D_VALUES, E, CONFIG))
    d_pre = -bend * back * d_values
    d_pre += tl.load(at.whole(scratch, at.D_KEYS, E, CONFIG)) * slope(gate, pre * gate)
    put(at.whole(scratch, at.HIDDEN, E, CONFIG), d_pre)


@triton.jit
def write_mlp_back(
    streams, place, exists, state, d_state, memory, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """Move the gradients of an MLP memory's write values and second keys to its weights, keys and values.

    Each part is a loop of one turn, as `scratch.again` says.
    """
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    ASKED: tl.constexpr = CONFIG.spec.objective == "l2" or CONFIG.spec.own_target
    for turn in tl.range(at.opaque(100, scratch), 101, disable_licm=True):
        values_back(at.again(scratch, 16 * memory + turn), SECOND.outputs, CONFIG)
    for turn in tl.range(at.opaque(101, scratch), 102, disable_licm=True):
        second_writes_back(at.again(scratch, 16 * memory + turn), SECOND.outputs, CONFIG)
    for turn in tl.range(at.opaque(102, scratch), 103, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        pushes_back(exists, layer_at(state, at.opaque(memory, here), SECOND), here, KIND, CONFIG)
    for turn in tl.range(at.opaque(103, scratch), 104, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        written, push = at.matrix(here, at.TEMPORARY, CONFIG), at.matrix(here, at.PUSH, CONFIG)
        hidden, d_error = at.matrix(here, at.HIDDEN, CONFIG), at.matrix(here, at.D_SECOND, CONFIG)
        d_second = layer_at(d_state, at.opaque(memory, here), SECOND)
        add_outers(d_second, written, push, hidden, d_error, exists, SECOND, ASKED, CONFIG)
    if ASKED:
        for turn in tl.range(at.opaque(104, scratch), 105, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            errors_back(exists, layer_at(state, at.opaque(memory, here), SECOND), here, SECOND, CONFIG)
    for turn in tl.range(at.opaque(105, scratch), 106, disable_licm=True):
        hidden_back(at.again(scratch, 16 * memory + turn), CONFIG)
    for turn in tl.range(at.opaque(106, scratch), 107, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        of_keys, of_values = at.matrix(here, at.HIDDEN, CONFIG), at.matrix(here, at.TEMPORARY, CONFIG)
        d_first = layer_at(d_state, at.opaque(memory, here), FIRST)
        OWN: tl.constexpr = CONFIG.spec.own_target
        add_outers(d_first, k, of_keys, v, of_values, exists, FIRST, OWN, CONFIG)
    for turn in tl.range(at.opaque(107, scratch), 108, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        first = layer_at(state, at.opaque(memory, here), FIRST)
        d_k = ask_back(at.matrix(here, at.HIDDEN, CONFIG), exists, first, FIRST, CONFIG)
        add(at.whole(here, at.D_K, CONFIG.dim, CONFIG), d_k)
        if CONFIG.spec.own_target:
            d_v = ask_back(at.matrix(here, at.TEMPORARY, CONFIG), exists, first, FIRST, CONFIG)
            add(at.whole(here, at.D_V, CONFIG.dim, CONFIG), d_v)
