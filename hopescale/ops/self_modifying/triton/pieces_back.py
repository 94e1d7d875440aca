"""The way back through `pieces.py`: what a piece of a chunk did to its memories."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, keep_pairs, open_pairs, read_layer
from hopescale.ops.self_modifying.triton.layers_back import (
    carry_back,
    entered_back,
    gradients_at,
    keep_asked,
    keys_back,
    move_back,
    move_states_back,
    pair_back,
    read_back,
    read_starts_back,
    read_states_back,
    solved_back,
    starts_back,
)
from hopescale.ops.self_modifying.triton.matrices import add, factor, load_rows, put, sigmoid, slope
from hopescale.ops.self_modifying.triton.memories import tokens_at, write
from hopescale.ops.self_modifying.triton.memories_back import write_linear_back, write_mlp_back
from hopescale.ops.self_modifying.triton.pieces import layers_at


@triton.jit
def clear_piece(scratch, CONFIG: tl.constexpr):
    """Set to 0 what gradients gather in over all memories."""
    ROWS: tl.constexpr = CONFIG.rows
    D: tl.constexpr = CONFIG.dim
    tl.debug_barrier()
    for index in tl.static_range(at.D_RATE, at.D_LAST):
        tl.store(at.row(scratch, index, CONFIG), tl.zeros((ROWS,), tl.float32))
    LAST: tl.constexpr = at.D_WRITE + CONFIG.reading
    for index in tl.static_range(at.D_KEPT, LAST + 1):
        tl.store(at.table(scratch, index, CONFIG), tl.zeros((ROWS, ROWS), tl.float32))
    for index in tl.static_range(at.D_K, at.D_ENDS + 1):
        tl.store(at.whole(scratch, index, D, CONFIG), tl.zeros((ROWS, D), tl.float32))
    tl.debug_barrier()


@triton.jit
def clear_layer(scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Set the gradients of what is written to a layer, and of what was held, to 0."""
    C: tl.constexpr = CONFIG.rows
    N: tl.constexpr = LAYER.outputs
    nothing = tl.zeros((C, N), tl.float32)
    tl.debug_barrier()
    tl.store(gradients_at(scratch, 0, LAYER, CONFIG), nothing)
    if CONFIG.spec.erase:
        tl.store(gradients_at(scratch, 1, LAYER, CONFIG), nothing)
    tl.debug_barrier()


@triton.jit
def hold_again(keys, exists, layer, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what was held, and make room for gradients."""
    if CONFIG.spec.erase:
        written = factor(tl.load(at.of_layer(layer, 0, LAYER.outputs, CONFIG)), CONFIG)
        held = hold(keys, exists, written, before, scratch, LAYER, CONFIG)
        put(at.of_layer(layer, 1, LAYER.outputs, CONFIG), held)
    clear_layer(scratch, LAYER, CONFIG)


@triton.jit
def write_again(memory, number, streams, place, exists, slots, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Compute again what a memory wrote and held, and make room for the gradients. Arguments as in `pass_memory_back`.

    A part of the way back is a loop of one turn, as `scratch.again` says.
    """
    start, before = slots
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    C: tl.constexpr = CONFIG.rows
    E: tl.constexpr = CONFIG.hidden
    for turn in tl.range(at.opaque(80, scratch), 81, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        own, layer = at.opaque(memory, here), at.of_first(here, at.opaque(number, here), CONFIG)
        written, _ = write(k, v, exists, start[0], own, here, KIND, True, CONFIG)
        put(at.of_layer(layer, 0, FIRST.outputs, CONFIG), written)
    for turn in tl.range(at.opaque(81, scratch), 82, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        layer = at.of_first(here, at.opaque(number, here), CONFIG)
        hold_again(k, exists, layer, layers_at(before, at.opaque(memory, here), FIRST), here, FIRST, CONFIG)
    if CONFIG.mlp:
        for turn in tl.range(at.opaque(82, scratch), 83, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            keep_pairs(at.matrix(here, at.KEYS, CONFIG), exists, here, SECOND, CONFIG)
        for turn in tl.range(at.opaque(95, scratch), 96, disable_licm=True):
            open_pairs(at.again(scratch, 16 * memory + turn), SECOND, CONFIG)
        for turn in tl.range(at.opaque(83, scratch), 84, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            keys, above = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
            hold_again(keys, exists, above, layers_at(before, at.opaque(memory, here), SECOND), here, SECOND, CONFIG)
            put(at.whole(here, SECOND.d_keys, E, CONFIG), tl.zeros((C, E), tl.float32))


@triton.jit
def read_second_back(streams, place, exists, before, d_y, scratch, CONFIG: tl.constexpr):
    """Move the gradient of outputs through the second layer of the memory that was read, to what its first one read."""
    C: tl.constexpr = CONFIG.rows
    E: tl.constexpr = CONFIG.hidden
    FIRST: tl.constexpr = CONFIG.vectors.first
    SECOND: tl.constexpr = CONFIG.vectors.second
    for turn in tl.range(at.opaque(21, scratch), 22, disable_licm=True):
        here = at.again(scratch, turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        layer = at.of_first(here, 0, CONFIG)
        written = factor(tl.load(at.of_layer(layer, 0, E, CONFIG)), CONFIG)
        held = factor(tl.load(at.of_layer(layer, 1, E, CONFIG)), CONFIG)
        first = layers_at(before, at.opaque(0, here), FIRST)
        pre = read_layer(q, k, exists, written, held, first, here, FIRST, CONFIG)
        put(at.whole(here, at.D_INNER, E, CONFIG), pre)
        put(at.whole(here, at.INNER, E, CONFIG), pre * sigmoid(pre))
        put(at.whole(here, at.TEMPORARY, E, CONFIG), tl.zeros((C, E), tl.float32))
    for turn in tl.range(at.opaque(28, scratch), 29, disable_licm=True):
        here = at.again(scratch, turn)
        inner, keys = at.matrix(here, at.INNER, CONFIG), at.matrix(here, at.KEYS, CONFIG)
        keep_asked(inner, keys, exists, here, SECOND, CONFIG)
    for turn in tl.range(at.opaque(22, scratch), 23, disable_licm=True):
        read_second_weights_back(exists, place, d_y, at.again(scratch, turn), False, CONFIG)
    if CONFIG.spec.erase:
        for turn in tl.range(at.opaque(23, scratch), 24, disable_licm=True):
            read_second_weights_back(exists, place, d_y, at.again(scratch, turn), True, CONFIG)
    for turn in tl.range(at.opaque(24, scratch), 25, disable_licm=True):
        here = at.again(scratch, turn)
        inner, d_q = at.matrix(here, at.INNER, CONFIG), at.matrix(here, at.TEMPORARY, CONFIG)
        gradient, second = d_y + at.opaque(place, here) * CONFIG.dim, layers_at(before, at.opaque(0, here), SECOND)
        read_starts_back(inner, exists, gradient, second, d_q, here, SECOND, CONFIG)
        pre, d_inner = tl.load(at.whole(here, at.D_INNER, E, CONFIG)), tl.load(at.whole(here, at.TEMPORARY, E, CONFIG))
        gate = sigmoid(pre)
        put(at.whole(here, at.D_INNER, E, CONFIG), d_inner * slope(gate, pre * gate))
        add(at.whole(here, at.D_Q, CONFIG.dim, CONFIG), load_rows(gradient, exists, CONFIG.dim))


@triton.jit
def read_second_weights_back(exists, place, d_y, scratch, ERASES: tl.constexpr, CONFIG: tl.constexpr):
    """Do `read_back` for the second layer of the memory that was read; queries' gradient is a temporary matrix."""
    inner, keys = at.matrix(scratch, at.INNER, CONFIG), at.matrix(scratch, at.KEYS, CONFIG)
    above, d_q = at.matrix(scratch, at.SECOND, CONFIG), at.matrix(scratch, at.TEMPORARY, CONFIG)
    gradient = d_y + at.opaque(place, scratch) * CONFIG.dim
    SECOND: tl.constexpr = CONFIG.vectors.second
    read_back(inner, keys, exists, above, gradient, d_q, scratch, ERASES, SECOND, CONFIG)


@triton.jit
def read_first_weights_back(streams, exists, place, d_y, scratch, ERASES: tl.constexpr, CONFIG: tl.constexpr):
    """Do `read_back` for the first layer of the memory that was read."""
    k, v, q = tokens_at(streams, at.opaque(place, scratch), scratch, CONFIG)
    gradient, d_q = read_gradient(d_y, place, scratch, CONFIG), at.matrix(scratch, at.D_Q, CONFIG)
    FIRST: tl.constexpr = CONFIG.vectors.first
    read_back(q, k, exists, at.of_first(scratch, 0, CONFIG), gradient, d_q, scratch, ERASES, FIRST, CONFIG)


@triton.jit
def read_memory_back(streams, place, exists, before, d_y, scratch, CONFIG: tl.constexpr):
    """Move the gradient of outputs to keys, queries and writes of the memory that was read, the first one."""
    FIRST: tl.constexpr = CONFIG.vectors.first
    if CONFIG.mlp:
        read_second_back(streams, place, exists, before, d_y, scratch, CONFIG)
    for turn in tl.range(at.opaque(29, scratch), 30, disable_licm=True):
        here = at.again(scratch, turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        keep_asked(q, k, exists, here, FIRST, CONFIG)
    for turn in tl.range(at.opaque(25, scratch), 26, disable_licm=True):
        read_first_weights_back(streams, exists, place, d_y, at.again(scratch, turn), False, CONFIG)
    if CONFIG.spec.erase:
        for turn in tl.range(at.opaque(26, scratch), 27, disable_licm=True):
            read_first_weights_back(streams, exists, place, d_y, at.again(scratch, turn), True, CONFIG)
    for turn in tl.range(at.opaque(27, scratch), 28, disable_licm=True):
        here = at.again(scratch, turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        gradient, d_q = read_gradient(d_y, place, here, CONFIG), at.matrix(here, at.D_Q, CONFIG)
        first = layers_at(before, at.opaque(0, here), FIRST)
        read_starts_back(q, exists, gradient, first, d_q, here, FIRST, CONFIG)


@triton.jit
def read_gradient(d_y, place, scratch, CONFIG: tl.constexpr):
    """Point to the gradient of what the first layer of the memory that is read has answered, in a piece."""
    gradient = d_y + at.opaque(place, scratch) * CONFIG.dim
    if CONFIG.mlp:
        gradient = at.matrix(scratch, at.D_INNER, CONFIG)
    return gradient


@triton.jit
def second_back(memory, exists, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients back over what a piece did to a second layer, whose keys no other layer has."""
    K: tl.constexpr = LAYER.inputs
    C: tl.constexpr = CONFIG.rows
    for turn in tl.range(at.opaque(84, scratch), 85, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        keys, layer = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
        gradients = layers_at(back, at.opaque(memory, here), LAYER)
        move_states_back(keys, exists, layer, gradients, here, LAYER, CONFIG)
    for turn in tl.range(at.opaque(85, scratch), 86, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        keys, layer = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
        gradients = layers_at(back, at.opaque(memory, here), LAYER)
        move_back(keys, exists, layer, gradients, here, LAYER, CONFIG)
        d_keys = entered_back(layer, gradients, tl.zeros((C, K), tl.float32), here, LAYER, CONFIG)
        add(at.whole(here, LAYER.d_keys, K, CONFIG), d_keys)
    if CONFIG.spec.erase:
        for turn in tl.range(at.opaque(86, scratch), 87, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            keys, layer = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
            held = layers_at(before, at.opaque(memory, here), LAYER)
            sums = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
            sums = solved_back(layer, held, sums, LAYER, CONFIG)
            starts_back(keys, exists, sums, here, LAYER, CONFIG)
        for turn in tl.range(at.opaque(87, scratch), 88, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            keys, layer = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
            weights = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
            keys_back(keys, exists, pair_back(layer, exists, weights, LAYER, CONFIG), here, LAYER, CONFIG)
    for turn in tl.range(at.opaque(88, scratch), 89, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        keys, layer = at.matrix(here, at.KEYS, CONFIG), at.matrix(here, at.SECOND, CONFIG)
        own = at.opaque(memory, here)
        held, gradients = layers_at(before, own, LAYER), layers_at(back, own, LAYER)
        carry_back(keys, exists, layer, held, gradients, here, LAYER, CONFIG)


@triton.jit
def carry_firsts_back(
    first, count, streams, place, exists, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr
):  # fmt: skip
    """Do `carry_back` for the first layers of `count` memories, the first of which is `first` among all."""
    for number in tl.range(0, count, disable_licm=True):
        here = at.again(scratch, 50 + at.opaque(number, scratch))
        memory = at.opaque(number, here)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        layer = at.of_first(here, first + memory, CONFIG)
        held, gradients = layers_at(before, memory, LAYER), layers_at(back, memory, LAYER)
        carry_back(k, exists, layer, held, gradients, here, LAYER, CONFIG)


@triton.jit
def first_keys_back(streams, place, exists, before, back, scratch, CONFIG: tl.constexpr):
    """Move to the keys of all first layers, which are the same, what enters states and momenta and what was solved for.

    It is summed in registers, and tables are met once.
    """
    VECTORS: tl.constexpr = CONFIG.vectors.first
    GATES: tl.constexpr = CONFIG.moved_gates.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    C: tl.constexpr = CONFIG.rows
    D: tl.constexpr = CONFIG.dim
    for turn in tl.range(at.opaque(30, scratch), 31, disable_licm=True):
        here = at.again(scratch, turn)
        total = tl.zeros((C, D), tl.float32)
        if CONFIG.gate_memories:
            for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
                memory = at.opaque(number, here)
                layer, gradients = at.of_first(here, WIDE + memory, CONFIG), layers_at(back, memory, GATES)
                total = entered_back(layer, gradients, total, here, GATES, CONFIG)
        for number in tl.range(0, WIDE, disable_licm=True):
            memory = at.opaque(number, here)
            layer, gradients = at.of_first(here, memory, CONFIG), layers_at(back, memory, VECTORS)
            total = entered_back(layer, gradients, total, here, VECTORS, CONFIG)
        add(at.whole(here, VECTORS.d_keys, D, CONFIG), total)
    if CONFIG.spec.erase:
        for turn in tl.range(at.opaque(31, scratch), 32, disable_licm=True):
            here = at.again(scratch, turn)
            k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
            starts_back(k, exists, first_solved_back(before, here, CONFIG), here, VECTORS, CONFIG)
        for turn in tl.range(at.opaque(33, scratch), 34, disable_licm=True):
            here = at.again(scratch, turn)
            k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
            keys_back(k, exists, first_pairs_back(exists, here, CONFIG), here, VECTORS, CONFIG)


@triton.jit
def first_solved_back(before, scratch, CONFIG: tl.constexpr):
    """Sum `solved_back` over all first layers."""
    VECTORS: tl.constexpr = CONFIG.vectors.first
    GATES: tl.constexpr = CONFIG.moved_gates.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    C: tl.constexpr = CONFIG.rows
    D: tl.constexpr = CONFIG.dim
    a, b = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    if CONFIG.gate_memories:
        for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            memory = at.opaque(number, scratch)
            layer, slots = at.of_first(scratch, WIDE + memory, CONFIG), layers_at(before, memory, GATES)
            a, b = solved_back(layer, slots, (a, b), GATES, CONFIG)
    for number in tl.range(0, WIDE, disable_licm=True):
        memory = at.opaque(number, scratch)
        layer, slots = at.of_first(scratch, memory, CONFIG), layers_at(before, memory, VECTORS)
        a, b = solved_back(layer, slots, (a, b), VECTORS, CONFIG)
    return a, b


@triton.jit
def first_pairs_back(exists, scratch, CONFIG: tl.constexpr):
    """Sum `pair_back` over all first layers."""
    VECTORS: tl.constexpr = CONFIG.vectors.first
    GATES: tl.constexpr = CONFIG.moved_gates.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    C: tl.constexpr = CONFIG.rows
    of_writes, of_erases = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    if CONFIG.gate_memories:
        for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            layer = at.of_first(scratch, WIDE + at.opaque(number, scratch), CONFIG)
            of_writes, of_erases = pair_back(layer, exists, (of_writes, of_erases), GATES, CONFIG)
    for number in tl.range(0, WIDE, disable_licm=True):
        layer = at.of_first(scratch, at.opaque(number, scratch), CONFIG)
        of_writes, of_erases = pair_back(layer, exists, (of_writes, of_erases), VECTORS, CONFIG)
    return of_writes, of_erases


@triton.jit
def first_layers_back(streams, place, exists, before, back, scratch, CONFIG: tl.constexpr):
    """Turn gradients of all first layers, after `move_back`, into those before the piece; move them to their keys."""
    VECTORS: tl.constexpr = CONFIG.vectors.first
    GATES: tl.constexpr = CONFIG.moved_gates.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    first_keys_back(streams, place, exists, before, back, scratch, CONFIG)
    if CONFIG.gate_memories:
        carry_firsts_back(WIDE, CONFIG.gate_moves, streams, place, exists, before, back, scratch, GATES, CONFIG)
    carry_firsts_back(0, WIDE, streams, place, exists, before, back, scratch, VECTORS, CONFIG)


@triton.jit
def pass_memory_back(
    memory, number, streams, place, exists, slots, backs, d_y, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Do the way back through `pass_memory`, but for gradients of the first layer's weights after the piece.

    The memory that is read comes with gradients of what it wrote, by `read_memory_back`.

    Args:
        number: Number of the memory among all that are moved, vector memories first.
        streams: Pointers to inputs of keys, values and queries of all tokens.
        place: Place of the piece's first token.
        slots: Pointers to packed weights and momentum at the chunk's start and before the piece.
        backs: Pointers to packed gradients of those at the chunk's start, and of those after the piece, which become
            those before it.
        d_y: Pointer to the gradient of all outputs.
    """
    start, before = slots
    d_start, back = backs
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    READS: tl.constexpr = not KIND.narrow and CONFIG.spec.read != "boundary"
    write_again(memory, number, streams, place, exists, slots, scratch, KIND, CONFIG)
    if READS and memory == 0:
        read_memory_back(streams, place, exists, before, d_y, scratch, CONFIG)
    if CONFIG.mlp:
        second_back(memory, exists, before, back, scratch, SECOND, CONFIG)
        if READS and memory == 0:
            moved = layers_at(back, memory, SECOND)
            gradient, inner = d_y + place * CONFIG.dim, at.matrix(scratch, at.INNER, CONFIG)
            read_states_back(inner, exists, gradient, moved, scratch, SECOND, CONFIG)
    for turn in tl.range(at.opaque(89, scratch), 90, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        layer = at.of_first(here, at.opaque(number, here), CONFIG)
        move_states_back(k, exists, layer, layers_at(back, at.opaque(memory, here), FIRST), here, FIRST, CONFIG)
    for turn in tl.range(at.opaque(90, scratch), 91, disable_licm=True):
        here = at.again(scratch, 16 * memory + turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        layer = at.of_first(here, at.opaque(number, here), CONFIG)
        move_back(k, exists, layer, layers_at(back, at.opaque(memory, here), FIRST), here, FIRST, CONFIG)
    if CONFIG.mlp:
        write_mlp_back(streams, place, exists, start[0], d_start, memory, scratch, KIND, CONFIG)
    else:
        for turn in tl.range(at.opaque(91, scratch), 92, disable_licm=True):
            here = at.again(scratch, 16 * memory + turn)
            k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
            write_linear_back(k, v, exists, start[0], d_start, at.opaque(memory, here), here, KIND, CONFIG)
