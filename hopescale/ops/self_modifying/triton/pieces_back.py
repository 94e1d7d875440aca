"""The way back through `pieces.py`: what a piece of a chunk did to one memory, and its tables."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, open_keys, read_layer
from hopescale.ops.self_modifying.triton.layers_back import (
    carry_back,
    gradients_at,
    keys_back,
    move_back,
    pair_back,
    read_back,
    read_states_back,
)
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, sigmoid, slope
from hopescale.ops.self_modifying.triton.memories import write
from hopescale.ops.self_modifying.triton.memories_back import write_linear_back, write_mlp_back
from hopescale.ops.self_modifying.triton.pieces import layers_at
from hopescale.ops.self_modifying.triton.tables import gate_products, gates_back


@triton.jit
def clear_piece(scratch, CONFIG: tl.constexpr):
    """Set to 0 what gradients gather in over all memories."""
    ROWS: tl.constexpr = CONFIG.rows
    D: tl.constexpr = CONFIG.dim
    tl.debug_barrier()
    for index in tl.static_range(at.D_RATE, at.D_LAST + 1):
        tl.store(at.row(scratch, index, CONFIG), tl.zeros((ROWS,), tl.float32))
    LAST: tl.constexpr = at.D_WRITE + CONFIG.reading
    for index in tl.static_range(at.D_KEPT, LAST + 1):
        tl.store(at.table(scratch, index, CONFIG), tl.zeros((ROWS, ROWS), tl.float32))
    for index in tl.static_range(at.D_K, at.D_Q + 1):
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
def read_memory_back(inputs, exists, before, d_y, scratch, CONFIG: tl.constexpr):
    """Move the gradient of outputs to keys, queries and writes of the memory that was read, the first one."""
    k, v, q = inputs
    D: tl.constexpr = CONFIG.dim
    E: tl.constexpr = CONFIG.hidden
    FIRST: tl.constexpr = CONFIG.vectors.first
    SECOND: tl.constexpr = CONFIG.vectors.second
    first, gradient, layer = layers_at(before, 0, FIRST), d_y, at.of_first(scratch, 0, CONFIG)
    if CONFIG.mlp:
        add(at.whole(scratch, at.D_Q, D, CONFIG), load_rows(d_y, exists, D))
        inner, keys = at.matrix(scratch, at.INNER, CONFIG), at.matrix(scratch, at.KEYS, CONFIG)
        written, held = tl.load(at.of_layer(layer, 0, E, CONFIG)), tl.load(at.of_layer(layer, 1, E, CONFIG))
        pre = read_layer(q, k, exists, written, held, first, scratch, FIRST, CONFIG)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), pre)
        put(at.whole(scratch, at.INNER, E, CONFIG), pre * sigmoid(pre))
        second, above = layers_at(before, 0, SECOND), at.matrix(scratch, at.SECOND, CONFIG)
        d_inner = read_back(inner, keys, exists, above, d_y, second, scratch, SECOND, CONFIG)
        pre = tl.load(at.whole(scratch, at.D_INNER, E, CONFIG))
        gate = sigmoid(pre)
        put(at.whole(scratch, at.D_INNER, E, CONFIG), d_inner * slope(gate, pre * gate))
        gradient = at.matrix(scratch, at.D_INNER, CONFIG)
    d_q = read_back(q, k, exists, layer, gradient, first, scratch, FIRST, CONFIG)
    add(at.whole(scratch, at.D_Q, D, CONFIG), d_q)


@triton.jit
def hold_again(keys, exists, written, layer, before, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Keep what was held, and make room for gradients."""
    if CONFIG.spec.erase:
        held = hold(keys, exists, written, before, scratch, LAYER, CONFIG)
        put(at.of_layer(layer, 1, LAYER.outputs, CONFIG), held)
    clear_layer(scratch, LAYER, CONFIG)


@triton.jit
def write_again(memory, inputs, exists, slots, layer, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr):
    """Compute again what a memory wrote and held, and make room for the gradients; `layer` is its first one."""
    k, v, q = inputs
    start, before = slots
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    C: tl.constexpr = CONFIG.rows
    E: tl.constexpr = CONFIG.hidden
    written, _ = write(k, v, exists, start[0], memory, scratch, KIND, True, CONFIG)
    put(at.of_layer(layer, 0, FIRST.outputs, CONFIG), written)
    hold_again(k, exists, written, layer, layers_at(before, memory, FIRST), scratch, FIRST, CONFIG)
    if CONFIG.mlp:
        keys, above = at.matrix(scratch, at.KEYS, CONFIG), at.matrix(scratch, at.SECOND, CONFIG)
        open_keys(keys, exists, scratch, SECOND, True, CONFIG)
        written = tl.load(at.of_layer(above, 0, SECOND.outputs, CONFIG))
        hold_again(keys, exists, written, above, layers_at(before, memory, SECOND), scratch, SECOND, CONFIG)
        put(at.whole(scratch, SECOND.d_keys, E, CONFIG), tl.zeros((C, E), tl.float32))


@triton.jit
def second_back(memory, exists, before, back, scratch, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Move gradients back over what a piece did to a second layer, whose keys no other layer has.

    Returns:
        Pointers to the gradients of its weights.
    """
    K: tl.constexpr = LAYER.inputs
    C: tl.constexpr = CONFIG.rows
    keys, layer = at.matrix(scratch, at.KEYS, CONFIG), at.matrix(scratch, at.SECOND, CONFIG)
    held, gradients = layers_at(before, memory, LAYER), layers_at(back, memory, LAYER)
    move_back(keys, exists, layer, gradients, scratch, LAYER, CONFIG)
    sums = tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32), tl.zeros((C, K), tl.float32)
    sums = carry_back(keys, exists, layer, held, gradients, sums, scratch, LAYER, CONFIG)
    weights = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    if CONFIG.spec.erase:
        weights = pair_back(layer, exists, weights, LAYER, CONFIG)
    keys_back(keys, exists, sums, weights, scratch, LAYER, CONFIG)
    return gradients


@triton.jit
def first_layers_back(inputs, exists, before, back, scratch, CONFIG: tl.constexpr):
    """Turn gradients of all first layers, after `move_back`, into those before the piece, and move them to their keys.

    These are the same for all, so that what enters them is summed in registers, and tables are met once.
    """
    VECTORS: tl.constexpr = CONFIG.vectors.first
    GATES: tl.constexpr = CONFIG.moved_gates.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    C: tl.constexpr = CONFIG.rows
    D: tl.constexpr = CONFIG.dim
    keys, a = inputs[0], tl.zeros((C, D), tl.float32)
    b, c = a, a
    if CONFIG.gate_memories:
        for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            memory = at.opaque(number, scratch)
            layer = at.of_first(scratch, WIDE + memory, CONFIG)
            slots = layers_at(before, memory, GATES), layers_at(back, memory, GATES)
            a, b, c = carry_back(keys, exists, layer, slots[0], slots[1], (a, b, c), scratch, GATES, CONFIG)
    for number in tl.range(0, WIDE, disable_licm=True):
        memory = at.opaque(number, scratch)
        layer = at.of_first(scratch, memory, CONFIG)
        slots = layers_at(before, memory, VECTORS), layers_at(back, memory, VECTORS)
        a, b, c = carry_back(keys, exists, layer, slots[0], slots[1], (a, b, c), scratch, VECTORS, CONFIG)
    of_writes = tl.zeros((C, C), tl.float32)
    of_erases = of_writes
    if CONFIG.spec.erase:
        if CONFIG.gate_memories:
            for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
                layer = at.of_first(scratch, WIDE + at.opaque(number, scratch), CONFIG)
                of_writes, of_erases = pair_back(layer, exists, (of_writes, of_erases), GATES, CONFIG)
        for number in tl.range(0, WIDE, disable_licm=True):
            layer = at.of_first(scratch, at.opaque(number, scratch), CONFIG)
            of_writes, of_erases = pair_back(layer, exists, (of_writes, of_erases), VECTORS, CONFIG)
    keys_back(keys, exists, (a, b, c), (of_writes, of_erases), scratch, VECTORS, CONFIG)


@triton.jit
def pass_memory_back(
    memory, number, inputs, exists, slots, backs, d_y, scratch, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Do the way back through `pass_memory`, but for gradients of the first layer's weights after the piece.

    Args:
        number: Number of the memory among all that are moved, vector memories first.
        slots: Pointers to packed weights and momentum at the chunk's start and before the piece.
        backs: Pointers to packed gradients of those at the chunk's start, and of those after the piece, which become
            those before it.
        d_y: Pointer to the gradient of the first token's output.
    """
    k, v, q = inputs
    start, before = slots
    d_start, back = backs
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    READS: tl.constexpr = not KIND.narrow and CONFIG.spec.read != "boundary"
    layer = at.of_first(scratch, number, CONFIG)
    write_again(memory, inputs, exists, slots, layer, scratch, KIND, CONFIG)
    if READS and memory == 0:
        read_memory_back(inputs, exists, before, d_y, scratch, CONFIG)
    if CONFIG.mlp:
        moved = second_back(memory, exists, before, back, scratch, SECOND, CONFIG)
        if READS and memory == 0:
            read_states_back(at.matrix(scratch, at.INNER, CONFIG), exists, d_y, moved, scratch, SECOND, CONFIG)
    move_back(k, exists, layer, layers_at(back, memory, FIRST), scratch, FIRST, CONFIG)
    if CONFIG.mlp:
        write_mlp_back(k, v, exists, start[0], d_start, memory, scratch, KIND, CONFIG)
    else:
        write_linear_back(k, v, exists, start[0], d_start, memory, scratch, KIND, CONFIG)


@triton.jit
def tables_back(size, scratch, CONFIG: tl.constexpr):
    """Return the gradients of the logs of `alpha` and `mu` `[C]` from those of tables and of the weights at the end."""
    kept, write = tl.load(at.table(scratch, at.KEPT, CONFIG)), tl.load(at.table(scratch, at.WRITE, CONFIG))
    start, push = tl.load(at.row(scratch, at.START, CONFIG)), tl.load(at.row(scratch, at.PUSHED, CONFIG))
    chain, from_start = kept, start
    if CONFIG.momentum:
        chain, from_start = gate_products(at.MU, 0, scratch, CONFIG)
    d_kept, d_write = tl.load(at.table(scratch, at.D_KEPT, CONFIG)), tl.load(at.table(scratch, at.D_WRITE, CONFIG))
    d_start, d_push = tl.load(at.row(scratch, at.D_START, CONFIG)), tl.load(at.row(scratch, at.D_PUSHED, CONFIG))
    d_chain, d_from_start = tl.zeros_like(d_write), tl.zeros_like(d_push)
    direct = tl.zeros_like(d_start)
    if CONFIG.reading:
        retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
        read_kept = tl.load(at.table(scratch, at.D_KEPT + CONFIG.reading, CONFIG))
        read_write = tl.load(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG))
        read_start = tl.load(at.row(scratch, at.D_START + CONFIG.reading, CONFIG))
        read_push = tl.load(at.row(scratch, at.D_PUSHED + CONFIG.reading, CONFIG))
        if not CONFIG.momentum:
            read_kept, read_start = read_kept + read_write, read_start + read_push
        direct = tl.sum(read_kept * kept, 1) + read_start * start
        if CONFIG.momentum:
            direct += tl.sum(read_write * write, 1) + read_push * push
            d_chain, d_from_start = read_write, read_push
            d_write, d_push = d_write + retention[:, None] * read_write, d_push + retention * read_push
        d_kept, d_start = d_kept + retention[:, None] * read_kept, d_start + retention * read_start
        direct *= retention
    if not CONFIG.momentum:  # writes and erases weigh the same
        d_kept, d_start = d_kept + d_write, d_start + d_push
    decay = kept, start, chain, from_start, write, push
    d_decay = d_kept, d_start, d_chain, d_from_start, d_write, d_push
    d_alpha, d_mu = gates_back(decay, d_decay, size, scratch, CONFIG)
    return d_alpha + direct, d_mu
