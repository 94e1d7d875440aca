"""What both directions do with a piece of a chunk: gates and tables, and how it moves a memory."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers import hold, move, open_keys, read_layer
from hopescale.ops.self_modifying.triton.matrices import load_rows, put, sigmoid, tile
from hopescale.ops.self_modifying.triton.memories import layer_at, make_gates, make_tokens, write
from hopescale.ops.self_modifying.triton.tables import decay_weights, last_weights, reading_tables


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
        tl.store(target + index, tl.load(source + index, mask=index < numbers), mask=index < numbers)


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
def keep_tables(retention, size, scratch, CONFIG: tl.constexpr):
    """Keep the tables of a piece, and what they say of its end."""
    decay = decay_weights(scratch, CONFIG)
    keep_of_state(decay[0], decay[1], decay[4], decay[5], 0, scratch, CONFIG)
    if CONFIG.reading:
        kept, start, write, push = reading_tables(decay, retention, scratch, CONFIG)
        keep_of_state(kept, start, write, push, CONFIG.reading, scratch, CONFIG)
    erase, first, wrote, pushed, link, momentum_decay = last_weights(decay, size, scratch, CONFIG)
    tl.store(at.row(scratch, at.ERASED, CONFIG), erase)
    tl.store(at.row(scratch, at.WROTE, CONFIG), wrote)
    tl.store(at.row(scratch, at.LINK, CONFIG), link)
    last = scratch + at.LAST * CONFIG.rows
    tl.store(last, first)
    tl.store(last + 1, pushed)
    tl.store(last + 2, momentum_decay)
    tl.debug_barrier()


@triton.jit
def keep_of_state(kept, start, write, push, BEHIND: tl.constexpr, scratch, CONFIG: tl.constexpr):
    """Keep what the states are made of that tokens meet, some places behind those of the states before writes."""
    tl.store(at.table(scratch, at.KEPT + BEHIND, CONFIG), kept)
    tl.store(at.table(scratch, at.WRITE + BEHIND, CONFIG), write)
    tl.store(at.row(scratch, at.START + BEHIND, CONFIG), start)
    tl.store(at.row(scratch, at.PUSHED + BEHIND, CONFIG), push)


@triton.jit
def open_piece(logits, streams, exists, size, boundary, scratch, BACK: tl.constexpr, CONFIG: tl.constexpr):
    """Make keys, values, queries, gates and tables of a piece; return where the first three lie.

    Args:
        logits: Pointers to the first token's logits of the gates.
        streams: Pointers to its inputs of keys, values and queries.
        size: Number of tokens.
        boundary: Pointer to packed weights at the chunk's start.
        BACK: Whether what is made is for the way back.
    """
    inputs = make_tokens(streams, exists, boundary, scratch, CONFIG)
    keep_tables(make_gates(logits, streams[0], exists, boundary, scratch, CONFIG), size, scratch, CONFIG)
    FIRST: tl.constexpr = CONFIG.vectors.first
    open_keys(inputs[0], exists, scratch, FIRST, BACK, CONFIG)
    return inputs


@triton.jit
def layers_at(slot, memory, LAYER: tl.constexpr):
    """Point to the weights and the momentum of a memory's layer."""
    return layer_at(slot[0], memory, LAYER), layer_at(slot[1], memory, LAYER)


@triton.jit
def pass_memory(
    memory, inputs, exists, slots, out, scratch, READ: tl.constexpr, KIND: tl.constexpr, CONFIG: tl.constexpr
):
    """Move one memory over a piece; with `READ` read the first vector memory on the way.

    Args:
        inputs: Result of `open_piece`.
        slots: Pointers to packed weights and momentum at the chunk's start, before the piece and after it.
        out: Pointers to the first token's output and to the norm of its error.
    """
    k, v, q = inputs
    start, before, after = slots
    y, surprise = out
    FIRST: tl.constexpr = KIND.first
    SECOND: tl.constexpr = KIND.second
    N: tl.constexpr = SECOND.outputs
    READS: tl.constexpr = READ and not KIND.narrow and CONFIG.spec.read != "boundary"
    first, moved = layers_at(before, memory, FIRST), layers_at(after, memory, FIRST)
    written, error = write(k, v, exists, start[0], memory, scratch, KIND, False, CONFIG)
    if READ and not KIND.narrow:
        tl.store(surprise + 3 * tl.arange(0, CONFIG.rows), error, mask=exists & (memory == 0))
    held = hold(k, exists, written, first, scratch, FIRST, CONFIG)
    if READS and memory == 0:
        found = read_layer(q, k, exists, written, held, first, scratch, FIRST, CONFIG)
        if CONFIG.mlp:
            put(at.whole(scratch, at.INNER, FIRST.outputs, CONFIG), found * sigmoid(found))
        else:
            tl.store(tile(y, CONFIG.rows, N), found, mask=exists[:, None])
    move(k, exists, written, held, first, moved, scratch, FIRST, CONFIG)
    if CONFIG.mlp:
        second, moved = layers_at(before, memory, SECOND), layers_at(after, memory, SECOND)
        keys = at.matrix(scratch, at.KEYS, CONFIG)
        open_keys(keys, exists, scratch, SECOND, False, CONFIG)
        written = tl.load(at.whole(scratch, at.SECOND, N, CONFIG))
        held = hold(keys, exists, written, second, scratch, SECOND, CONFIG)
        if READS and memory == 0:
            inner = at.matrix(scratch, at.INNER, CONFIG)
            found = read_layer(inner, keys, exists, written, held, second, scratch, SECOND, CONFIG)
            tl.store(tile(y, CONFIG.rows, N), load_rows(q, exists, N) + found, mask=exists[:, None])
        move(keys, exists, written, held, second, moved, scratch, SECOND, CONFIG)


@triton.jit
def pass_memories(inputs, exists, slots, out, scratch, READ: tl.constexpr, CONFIG: tl.constexpr):
    """Move all memories over a piece. Arguments as in `pass_memory`."""
    VECTORS: tl.constexpr = CONFIG.vectors
    GATES: tl.constexpr = CONFIG.moved_gates
    if CONFIG.gate_memories:
        for memory in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            pass_memory(at.opaque(memory, scratch), inputs, exists, slots, out, scratch, READ, GATES, CONFIG)
    for memory in tl.range(0, CONFIG.vector_memories, disable_licm=True):
        pass_memory(at.opaque(memory, scratch), inputs, exists, slots, out, scratch, READ, VECTORS, CONFIG)


@triton.jit
def packed(states, momenta, slot, CONFIG: tl.constexpr):
    """Point to a packed set of weights and to its momentum."""
    state = states + slot * CONFIG.size
    momentum = state
    if CONFIG.momentum:
        momentum = momenta + slot * CONFIG.size
    return state, momentum
