"""The backward kernel: one program walks back over the chunks of one head of one document."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.layers_back import read_states_back
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, tile
from hopescale.ops.self_modifying.triton.memories import gates_at
from hopescale.ops.self_modifying.triton.memories_back import make_back, make_gate_back, retrieve_back
from hopescale.ops.self_modifying.triton.pieces import (
    choose,
    count_pieces,
    layers_at,
    open_piece,
    packed,
    pass_memories,
    place_document,
    place_of_scratch,
    place_piece,
)
from hopescale.ops.self_modifying.triton.pieces_back import (
    clear_piece,
    first_layers_back,
    pass_memory_back,
    tables_back,
)


@triton.jit
def pass_memories_back(inputs, exists, slots, backs, d_y, scratch, CONFIG: tl.constexpr):
    """Move gradients back over a piece, through all memories. Arguments as in `pass_memory_back`."""
    VECTORS: tl.constexpr = CONFIG.vectors
    GATES: tl.constexpr = CONFIG.moved_gates
    FIRST: tl.constexpr = VECTORS.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    if CONFIG.gate_memories:
        for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            memory = at.opaque(number, scratch)
            pass_memory_back(memory, WIDE + memory, inputs, exists, slots, backs, d_y, scratch, GATES, CONFIG)
    for number in tl.range(0, WIDE, disable_licm=True):
        memory = at.opaque(number, scratch)
        pass_memory_back(memory, memory, inputs, exists, slots, backs, d_y, scratch, VECTORS, CONFIG)
    first_layers_back(inputs, exists, slots[1], backs[1], scratch, CONFIG)
    if CONFIG.spec.read != "boundary":
        gradient = at.matrix(scratch, at.D_INNER, CONFIG) if CONFIG.mlp else d_y
        read_states_back(inputs[2], exists, gradient, layers_at(backs[1], 0, FIRST), scratch, FIRST, CONFIG)
    if CONFIG.spec.read == "boundary":
        gradient = load_rows(d_y, exists, CONFIG.dim)
        d_q = retrieve_back(inputs[2], exists, gradient, slots[0][0], backs[0], 0, scratch, VECTORS, CONFIG)
        add(at.whole(scratch, at.D_Q, CONFIG.dim, CONFIG), d_q)


@triton.jit
def streams_back(streams, exists, size, boundary, d_start, d_streams, d_logits, scratch, CONFIG: tl.constexpr):
    """Store the gradients of a piece's streams, from those of all that was made of them.

    Args:
        boundary: Pointer to packed weights at the chunk's start.
        d_start: Pointer to their gradient.
        d_streams: Pointers to the gradients of the first token's inputs of keys, values and queries.
        d_logits: Pointers to those of its logits of the gates.
    """
    k = streams[0]
    d_alpha, d_mu = tables_back(size, scratch, CONFIG)
    d_k = make_back(k, exists, boundary, d_start, scratch, CONFIG.memory_k, at.D_K, CONFIG)
    put(at.whole(scratch, at.D_K, CONFIG.dim, CONFIG), d_k)
    rate = tl.load(at.row(scratch, at.RATE, CONFIG))
    d_rate = tl.load(at.row(scratch, at.D_RATE, CONFIG)) * (1 - rate / CONFIG.spec.eta_max)
    make_gate_back(d_rate, k, exists, boundary, d_start, d_logits[0], scratch, CONFIG.memory_eta, CONFIG)
    if CONFIG.retention:
        retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
        d_alpha *= 1 - retention
        make_gate_back(d_alpha, k, exists, boundary, d_start, d_logits[1], scratch, CONFIG.memory_alpha, CONFIG)
    if CONFIG.momentum:
        push_retention = tl.load(at.row(scratch, at.MU, CONFIG))
        d_mu = (d_mu - tl.load(at.row(scratch, at.D_FRESH, CONFIG)) * push_retention) * (1 - push_retention)
        make_gate_back(d_mu, k, exists, boundary, d_start, d_logits[2], scratch, -1, CONFIG)
    d_k = tl.load(at.whole(scratch, at.D_K, CONFIG.dim, CONFIG))
    tl.store(tile(d_streams[0], CONFIG.rows, CONFIG.dim), d_k, mask=exists[:, None])
    d_v = make_back(streams[1], exists, boundary, d_start, scratch, CONFIG.memory_v, at.D_V, CONFIG)
    tl.store(tile(d_streams[1], CONFIG.rows, CONFIG.dim), d_v, mask=exists[:, None])
    d_q = make_back(streams[2], exists, boundary, d_start, scratch, CONFIG.memory_q, at.D_Q, CONFIG)
    tl.store(tile(d_streams[2], CONFIG.rows, CONFIG.dim), d_q, mask=exists[:, None])


@triton.jit
def enter_boundary(d_states, d_boundary, numbers):
    """Add the gradient of weights at a chunk's start, as what is asked, to that of weights as what is moved."""
    for begin in range(0, numbers, 1024):
        index = begin + tl.arange(0, 1024)
        inside = index < numbers
        total = tl.load(d_states + index, mask=inside) + tl.load(d_boundary + index, mask=inside)
        tl.debug_barrier()
        tl.store(d_states + index, total, mask=inside)
        tl.store(d_boundary + index, tl.zeros((1024,), tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["begin", "heads", "tokens", "chunk_size", "slots"])
def self_modify_back_kernel(
    k,
    v,
    q,
    eta,
    alpha,
    mu,
    states,
    momenta,
    replayed_states,
    replayed_momenta,
    d_y,
    d_state,
    d_momentum,
    d_boundary,
    dk,
    dv,
    dq,
    d_eta,
    d_alpha,
    d_mu,
    scratch,
    bounds,
    begin,
    heads,
    tokens,
    chunk_size,
    slots,
    numbers,
    scratch_size,
    CONFIG: tl.constexpr,
):
    """Walk back. Gradients of a program's weights and momentum after its last token become those before its first.

    `states` and `momenta` are those that all chunks begin with. Where a chunk has several pieces, all but the last move
    the memories once more from there, so that there are weights before each of them.
    """
    program = begin + tl.program_id(0).to(tl.int64)
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    number, head, place, length = place_document(program, bounds, heads, tokens)
    row = place // tokens
    token, slot = (row * heads + head) * tokens + place - row * tokens, head * slots + place // chunk_size + number
    rows, chunks = tl.arange(0, CONFIG.rows), tl.cdiv(length, chunk_size)
    backs = (d_boundary + program * CONFIG.size, packed(d_state, d_momentum, program, CONFIG))
    replays = program * (tl.cdiv(tl.minimum(chunk_size, tokens), CONFIG.rows) - 1)
    for step in tl.range(0, chunks, disable_licm=True):
        n = at.opaque(chunks - 1 - step, scratch)
        here = place_of_scratch(scratch, n)
        boundary = packed(states, momenta, slot + n, CONFIG)
        pieces, passes = 1, 1
        if CONFIG.cut:
            pieces = count_pieces(n, length, chunk_size, CONFIG)
            passes = 2 * pieces - 1
        for turn in tl.range(0, passes, disable_licm=True):
            p, before = turn, boundary
            if CONFIG.cut:
                p = tl.where(turn < passes - pieces, turn, passes - 1 - turn)
                before = choose(p == 0, boundary, packed(replayed_states, replayed_momenta, replays + p - 1, CONFIG))
            first, size = place_piece(n, p, length, chunk_size, CONFIG)
            exists, first = rows < size, token + first
            streams = k + first * CONFIG.dim, v + first * CONFIG.dim, q + first * CONFIG.dim
            logits = gates_at(eta, alpha, mu, first, CONFIG)
            inputs = open_piece(logits, streams, exists, size, boundary[0], here, True, CONFIG)
            if CONFIG.cut and turn < passes - pieces:
                after = packed(replayed_states, replayed_momenta, replays + p, CONFIG)
                pass_memories(inputs, exists, (boundary, before, after), (d_y, d_y), here, False, CONFIG)
            else:
                clear_piece(here, CONFIG)
                out = d_y + first * CONFIG.dim
                pass_memories_back(inputs, exists, (boundary, before), backs, out, here, CONFIG)
                d_streams = dk + first * CONFIG.dim, dv + first * CONFIG.dim, dq + first * CONFIG.dim
                d_logits = gates_at(d_eta, d_alpha, d_mu, first, CONFIG)
                streams_back(streams, exists, size, boundary[0], backs[0], d_streams, d_logits, here, CONFIG)
            tl.debug_barrier()
        enter_boundary(backs[1][0], backs[0], numbers)
