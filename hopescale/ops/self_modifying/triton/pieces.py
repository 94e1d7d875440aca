"""What both directions do with a piece of a chunk: gates and tables, and how it moves a memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import (
    entered,
    hold,
    keep_pairs,
    move,
    open_keys,
    open_pairs,
    read_layer,
)
from hopescale.ops.self_modifying.triton.matrices import factor, load_rows, put, sigmoid, tile
from hopescale.ops.self_modifying.triton.memories import (
    gates_at,
    layer_at,
    make_gates,
    make_tokens,
    streams_at,
    tokens_at,
    write,
)
from hopescale.ops.self_modifying.triton.tables import keep_tables, keep_writes


@triton.jit
def place_document(program, bounds, heads, tokens):
    """Find the document and the head of a program.

    Args:
        bounds: Pointer to the first token of each document among those of all rows, one row after the other.
        heads: Number of heads.
        tokens: Number of tokens of a row.

    Returns:
        Number of the document; the head; the first token among those of all rows; and how many there are.
    """
    number, head = program // heads, program % heads
    begin = tl.load(bounds + number)
    return number, head, begin, (tl.load(bounds + number + 1) - begin).to(tl.int32)


@triton.jit
def place_of_scratch(scratch, n):
    """Point to scratch memory in chunk `n`.

    It moves between chunks, so that addresses in it are computed where they are needed: before the loop over chunks,
    they would fill the registers.
    """
    return scratch + (n % 2) * at.SHIFT


@triton.jit
def copy_weights(source, target, numbers):
    """Copy packed weights, maybe to another type."""
    for begin in range(0, numbers, 2048):
        index = begin + tl.arange(0, 2048)
        inside = index < numbers
        tl.store(target + index, tl.load(source + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def copy_slot(source, target, numbers, CONFIG: tl.constexpr):
    """Copy packed weights and their momentum, `numbers` each, for all threads to read."""
    tl.debug_barrier()
    copy_weights(source[0], target[0], numbers)
    if CONFIG.momentum:
        copy_weights(source[1], target[1], numbers)
    tl.debug_barrier()


@triton.jit
def choose(use_first, first, second):
    """Return the first or the second pair of pointers."""
    return tl.where(use_first, first[0], second[0]), tl.where(use_first, first[1], second[1])


@triton.jit
def place_piece(n, p, tokens, chunk_size, CONFIG: tl.constexpr):
    """Find piece `p` of chunk `n`: its first token in the document, and how many there are."""
    first = n * chunk_size + p * CONFIG.rows
    return first, tl.minimum(CONFIG.rows, tl.minimum(chunk_size - p * CONFIG.rows, tokens - first))


@triton.jit
def count_pieces(n, tokens, chunk_size, CONFIG: tl.constexpr):
    """Count the pieces of chunk `n`."""
    return tl.cdiv(tl.minimum(chunk_size, tokens - n * chunk_size), CONFIG.rows)


@triton.jit
def open_piece(logits, streams, first, exists, size, boundary, scratch, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Make keys, values, queries, gates and tables of a piece.

    Args:
        logits: Pointers to logits of the gates of all tokens.
        streams: Pointers to their inputs of keys, values and queries.
        first: Place of the piece's first token.
        size: Number of tokens.
        boundary: Pointer to packed weights at the chunk's start.
        BACK: Whether what is made is for the way back.
    """
    FIRST: tl.constexpr = CONFIG.vectors.first
    for turn in tl.range(at.opaque(0, scratch), 1, disable_licm=True):
        here = at.again(scratch, turn)
        place = at.opaque(first, here)
        inputs = streams_at(streams, place, CONFIG)
        make_tokens(inputs, exists, boundary, here, CONFIG)
        make_gates(gates_at(logits, place, CONFIG), inputs[0], exists, boundary, here, CONFIG)
    for turn in tl.range(at.opaque(1, scratch), 2, disable_licm=True):
        keep_tables(size, at.again(scratch, turn), CONFIG)
        if CONFIG.momentum:
            keep_writes(size, at.again(scratch, turn), CONFIG)
    for turn in tl.range(at.opaque(2, scratch), 3, disable_licm=True):
        here = at.again(scratch, turn)
        keys, _, _ = tokens_at(streams, at.opaque(first, here), here, CONFIG)
        if BACK:
            keep_pairs(keys, exists, here, FIRST, CONFIG)
        else:
            open_keys(keys, exists, here, FIRST, CONFIG)
    if BACK:
        for turn in tl.range(at.opaque(3, scratch), 4, disable_licm=True):
            open_pairs(at.again(scratch, turn), FIRST, CONFIG)


@triton.jit
def layers_at(slot, memory, LAYER: tl.constexpr):
    """Point to the weights and the momentum of a memory's layer."""
    return layer_at(slot[0], memory, LAYER), layer_at(slot[1], memory, LAYER)


@triton.jit
def pass_first(
    memory, streams, place, exists, slots, out, scratch, READ: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Do the part of `pass_memory` that is a memory's first layer, and compute what its second one is written."""
    place = at.opaque(place, scratch)
    k, v, q = tokens_at(streams, place, scratch, CONFIG)
    start, before, after = slots
    FIRST: tl.constexpr = KIND.first
    N: tl.constexpr = FIRST.outputs
    number = at.opaque(memory, scratch)
    first, moved = layers_at(before, number, FIRST), layers_at(after, number, FIRST)
    written, error = write(k, v, exists, start[0], number, scratch, KIND, False, CONFIG)
    if READ and not KIND.narrow:
        report = out[1] + 3 * place + 2
        tl.store(report + 3 * tl.arange(0, CONFIG.rows), error, mask=exists & (memory == 0))
    held = hold(k, exists, factor(written, CONFIG), first, scratch, FIRST, CONFIG)
    enters, written, held = entered(written, held, scratch, CONFIG), factor(written, CONFIG), factor(held, CONFIG)
    if READ and not KIND.narrow and CONFIG.spec.read != "boundary" and memory == 0:
        found = read_layer(q, k, exists, written, held, first, scratch, FIRST, CONFIG)
        if CONFIG.mlp:
            put(at.whole(scratch, at.INNER, N, CONFIG), found * sigmoid(found))
        else:
            tl.store(tile(out[0] + place * N, CONFIG.rows, N), found, mask=exists[:, None])
    move(k, exists, enters, first, moved, scratch, FIRST, CONFIG)


@triton.jit
def pass_second(
    memory, streams, place, exists, slots, out, scratch, READ: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Do the part of `pass_memory` that is a memory's second layer, after `open_keys`."""
    place = at.opaque(place, scratch)
    start, before, after = slots
    SECOND: tl.constexpr = KIND.second
    N: tl.constexpr = SECOND.outputs
    number, keys = at.opaque(memory, scratch), at.matrix(scratch, at.KEYS, CONFIG)
    second, moved = layers_at(before, number, SECOND), layers_at(after, number, SECOND)
    written = factor(tl.load(at.whole(scratch, at.SECOND, N, CONFIG)), CONFIG)
    held = hold(keys, exists, written, second, scratch, SECOND, CONFIG)
    tl.debug_barrier()  # so that `written` is loaded again
    enters = entered(tl.load(at.whole(scratch, at.SECOND, N, CONFIG)), held, scratch, CONFIG)
    held = factor(held, CONFIG)
    if READ and not KIND.narrow and CONFIG.spec.read != "boundary" and memory == 0:
        inner = at.matrix(scratch, at.INNER, CONFIG)
        found = read_layer(inner, keys, exists, written, held, second, scratch, SECOND, CONFIG)
        k, v, q = tokens_at(streams, place, scratch, CONFIG)
        found += load_rows(q, exists, N)
        tl.store(tile(out[0] + place * N, CONFIG.rows, N), found, mask=exists[:, None])
    move(keys, exists, enters, second, moved, scratch, SECOND, CONFIG)


@triton.jit
def pass_memory(
    memory, streams, place, exists, slots, out, scratch, READ: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Move one memory over a piece; with `READ` read the first vector memory on the way.

    Args:
        streams: Pointers to inputs of keys, values and queries of all tokens.
        place: Place of the piece's first token.
        slots: Pointers to packed weights and momentum at the chunk's start, before the piece and after it.
        out: Pointers to outputs and statistics of all tokens.
    """
    for turn in tl.range(at.opaque(4, scratch), 5, disable_licm=True):
        here = at.again(scratch, 8 * memory + turn)
        pass_first(memory, streams, place, exists, slots, out, here, READ, KIND, CONFIG)
    if CONFIG.mlp:
        for turn in tl.range(at.opaque(5, scratch), 6, disable_licm=True):
            here = at.again(scratch, 8 * memory + turn)
            open_keys(at.matrix(here, at.KEYS, CONFIG), exists, here, KIND.second, CONFIG)
        for turn in tl.range(at.opaque(7, scratch), 8, disable_licm=True):
            here = at.again(scratch, 8 * memory + turn)
            pass_second(memory, streams, place, exists, slots, out, here, READ, KIND, CONFIG)


@triton.jit
def pass_memories(streams, place, exists, slots, out, scratch, READ: tl.constexpr, CONFIG: tl.constexpr):
    """Move all memories over a piece. Arguments as in `pass_memory`."""
    VECTORS: tl.constexpr = CONFIG.vectors
    GATES: tl.constexpr = CONFIG.moved_gates
    if CONFIG.gate_memories:
        for memory in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            pass_memory(at.opaque(memory, scratch), streams, place, exists, slots, out, scratch, READ, GATES, CONFIG)
    for memory in tl.range(0, CONFIG.vector_memories, disable_licm=True):
        pass_memory(at.opaque(memory, scratch), streams, place, exists, slots, out, scratch, READ, VECTORS, CONFIG)


@triton.jit
def packed(states, momenta, slot, CONFIG: tl.constexpr):
    """Point to a packed set of weights and to its momentum."""
    state = states + slot * CONFIG.size
    momentum = state
    if CONFIG.momentum:
        momentum = momenta + slot * CONFIG.size
    return state, momentum
