"""The backward kernel: one program walks back over the chunks of one head of one document."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.gates_back import (
    add_up_ends,
    chain_back,
    kept_back,
    momentum_gate_back,
    retention_back,
)
from hopescale.ops.self_modifying.triton.layers_back import read_states_back
from hopescale.ops.self_modifying.triton.matrices import load_rows, put, tile
from hopescale.ops.self_modifying.triton.memories import ask_first, tokens_at
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
    read_gradient,
)


@triton.jit
def pass_memories_back(streams, place, exists, slots, backs, d_y, scratch, CONFIG: tl.constexpr):
    """Move gradients back over a piece, through all memories. Arguments as in `pass_memory_back`."""
    VECTORS: tl.constexpr = CONFIG.vectors
    GATES: tl.constexpr = CONFIG.moved_gates
    FIRST: tl.constexpr = VECTORS.first
    WIDE: tl.constexpr = CONFIG.vector_memories
    if CONFIG.gate_memories:
        for number in tl.range(0, CONFIG.gate_moves, disable_licm=True):
            memory = at.opaque(number, scratch)
            pass_memory_back(memory, WIDE + memory, streams, place, exists, slots, backs, d_y, scratch, GATES, CONFIG)
    for number in tl.range(0, WIDE, disable_licm=True):
        memory = at.opaque(number, scratch)
        pass_memory_back(memory, memory, streams, place, exists, slots, backs, d_y, scratch, VECTORS, CONFIG)
    first_layers_back(streams, place, exists, slots[1], backs[1], scratch, CONFIG)
    for turn in tl.range(at.opaque(34, scratch), 35, disable_licm=True):
        here = at.again(scratch, turn)
        k, v, q = tokens_at(streams, at.opaque(place, here), here, CONFIG)
        if CONFIG.spec.read != "boundary":
            back = layers_at(backs[1], at.opaque(0, here), FIRST)
            read_states_back(q, exists, read_gradient(d_y, place, here, CONFIG), back, here, FIRST, CONFIG)
        else:
            gradient = load_rows(d_y + at.opaque(place, here) * CONFIG.dim, exists, CONFIG.dim)
            put(at.whole(here, at.PUSH, CONFIG.dim, CONFIG), gradient)
            if CONFIG.mlp:
                ask_first(q, exists, slots[0][0], 0, here, VECTORS, True, CONFIG)
            retrieve_back(q, exists, slots[0][0], backs[0], 0, here, at.D_Q, VECTORS, CONFIG)


@triton.jit
def stream_back(
    x, d_x, place, exists, boundary, d_start, scratch, MEMORY: tl.constexpr, GRADIENT: tl.constexpr,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a piece's inputs of values or queries, from that of what was made of them."""
    begin = at.opaque(place, scratch) * CONFIG.dim
    make_back(x + begin, exists, boundary, d_start, scratch, MEMORY, GRADIENT, CONFIG)
    d_inputs = tl.load(at.whole(scratch, GRADIENT, CONFIG.dim, CONFIG))
    tl.store(tile(d_x + begin, CONFIG.rows, CONFIG.dim), d_inputs, mask=exists[:, None])


@triton.jit
def gates_back(k, place, exists, boundary, d_start, d_logits, scratch, CONFIG: tl.constexpr):
    """Store the gradients of a piece's logits of the gates, and add to that of its inputs of keys, `k`."""
    for turn in tl.range(at.opaque(43, scratch), 44, disable_licm=True):
        here = at.again(scratch, turn)
        begin = at.opaque(place, here)
        rate = tl.load(at.row(here, at.RATE, CONFIG))
        d_rate = tl.load(at.row(here, at.D_RATE, CONFIG)) * (1 - rate / CONFIG.spec.eta_max)
        keys, pointer = k + begin * CONFIG.dim, d_logits[0] + begin
        make_gate_back(d_rate, keys, exists, boundary, d_start, pointer, here, CONFIG.memory_eta, CONFIG)
    for turn in tl.range(at.opaque(44, scratch), 45, disable_licm=True):
        here = at.again(scratch, turn)
        begin = at.opaque(place, here)
        keys = k + begin * CONFIG.dim
        if CONFIG.retention:
            d_alpha = tl.load(at.row(here, at.D_ALPHA, CONFIG)) * (1 - tl.load(at.row(here, at.ALPHA, CONFIG)))
            pointer = d_logits[1] + begin
            make_gate_back(d_alpha, keys, exists, boundary, d_start, pointer, here, CONFIG.memory_alpha, CONFIG)
        if CONFIG.momentum:
            push_retention, d_mu = tl.load(at.row(here, at.MU, CONFIG)), tl.load(at.row(here, at.D_MU, CONFIG))
            d_mu -= tl.load(at.row(here, at.D_FRESH, CONFIG)) * push_retention
            d_mu *= 1 - push_retention
            make_gate_back(d_mu, keys, exists, boundary, d_start, d_logits[2] + begin, here, -1, CONFIG)


@triton.jit
def streams_back(streams, place, exists, boundary, d_start, d_streams, d_logits, scratch, CONFIG: tl.constexpr):
    """Store the gradients of a piece's streams, from those of all that was made of them.

    Args:
        streams: Pointers to inputs of keys, values and queries of all tokens.
        place: Place of the piece's first token.
        boundary: Pointer to packed weights at the chunk's start.
        d_start: Pointer to their gradient.
        d_streams: Pointers to the gradients of the inputs.
        d_logits: Pointers to those of logits of the gates.
    """
    k, v, q = streams
    D: tl.constexpr = CONFIG.dim
    boundary = at.again(boundary, 1)
    for turn in tl.range(at.opaque(49, scratch), 50, disable_licm=True):
        add_up_ends(at.again(scratch, turn), CONFIG)
    if CONFIG.momentum:
        for turn in tl.range(at.opaque(40, scratch), 41, disable_licm=True):
            chain_back(at.again(scratch, turn), CONFIG)
        for turn in tl.range(at.opaque(41, scratch), 42, disable_licm=True):
            momentum_gate_back(at.again(scratch, turn), CONFIG)
    for turn in tl.range(at.opaque(47, scratch), 48, disable_licm=True):
        kept_back(at.again(scratch, turn), CONFIG)
    for turn in tl.range(at.opaque(48, scratch), 49, disable_licm=True):
        retention_back(at.again(scratch, turn), CONFIG)
    for turn in tl.range(at.opaque(42, scratch), 43, disable_licm=True):
        here = at.again(scratch, turn)
        keys = k + at.opaque(place, here) * D
        make_back(keys, exists, boundary, d_start, here, CONFIG.memory_k, at.D_K, CONFIG)
    gates_back(k, place, exists, boundary, d_start, d_logits, scratch, CONFIG)
    for turn in tl.range(at.opaque(45, scratch), 46, disable_licm=True):
        here = at.again(scratch, turn)
        d_k = tl.load(at.whole(here, at.D_K, D, CONFIG))
        tl.store(tile(d_streams[0] + at.opaque(place, here) * D, CONFIG.rows, D), d_k, mask=exists[:, None])
        stream_back(v, d_streams[1], place, exists, boundary, d_start, here, CONFIG.memory_v, at.D_V, CONFIG)
    for turn in tl.range(at.opaque(46, scratch), 47, disable_licm=True):
        here = at.again(scratch, turn)
        stream_back(q, d_streams[2], place, exists, boundary, d_start, here, CONFIG.memory_q, at.D_Q, CONFIG)


@triton.jit
def enter_boundary(d_states, d_boundary, numbers):
    """Add the gradient of weights at a chunk's start, as what is asked, to that of weights as what is moved."""
    for begin in range(0, numbers, 1024):
        index = begin + tl.arange(0, 1024)
        inside = index < numbers
        total = tl.load(d_states + index, mask=inside, other=0.0)
        total += tl.load(d_boundary + index, mask=inside, other=0.0)
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
    _, _, _, whole = place_document(begin + tl.program_id(0).to(tl.int64), bounds, heads, tokens)
    for step in tl.range(0, tl.cdiv(whole, chunk_size), disable_licm=True):
        # Where a program is in its document is found anew for each chunk: it would fill registers all the way.
        own = at.opaque(tl.program_id(0), scratch).to(tl.int64)
        program = begin + own
        number, head, place, length = place_document(program, bounds, heads, tokens)
        row, n = place // tokens, at.opaque(tl.cdiv(length, chunk_size) - 1 - step, scratch)
        token, slot = (row * heads + head) * tokens + place - row * tokens, head * slots + place // chunk_size + number
        backs = (d_boundary + program * CONFIG.size, packed(d_state, d_momentum, program, CONFIG))
        replays = program * (tl.cdiv(tl.minimum(chunk_size, tokens), CONFIG.rows) - 1)
        streams, logits = (k, v, q), (eta, alpha, mu)
        here = place_of_scratch(scratch + own * scratch_size, n)
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
            exists, first = tl.arange(0, CONFIG.rows) < size, token + first
            open_piece(logits, streams, first, exists, size, boundary[0], here, True, CONFIG)
            if CONFIG.cut and turn < passes - pieces:
                after = packed(replayed_states, replayed_momenta, replays + p, CONFIG)
                moved = boundary, before, after
                pass_memories(streams, first, exists, moved, (d_y, d_y), here, False, CONFIG)
            else:
                for part in tl.range(at.opaque(4, here), 5, disable_licm=True):
                    clear_piece(at.again(here, part), CONFIG)
                pass_memories_back(streams, first, exists, (boundary, before), backs, d_y, here, CONFIG)
                d_streams, d_logits = (dk, dv, dq), (d_eta, d_alpha, d_mu)
                streams_back(streams, first, exists, boundary[0], backs[0], d_streams, d_logits, here, CONFIG)
            tl.debug_barrier()
        enter_boundary(backs[1][0], backs[0], numbers)
