"""The backward kernel: one program walks back over the chunks of one head of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import add, load_rows, put, tile
from hopescale.ops.self_modifying.triton.memories import gates_at
from hopescale.ops.self_modifying.triton.memories_back import ask_back, make_back, make_gate_back
from hopescale.ops.self_modifying.triton.pieces import (
    count_pieces,
    open_piece,
    packed,
    pass_memories,
    place_piece,
)
from hopescale.ops.self_modifying.triton.pieces_back import clear_piece, pass_memory_back, tables_back


@triton.jit
def pass_memories_back(made, exists, places, backs, d_y, scratch, PLAN: tl.constexpr):
    """Move gradients back over a piece, through all memories. Arguments as in `pass_memory_back`."""
    if PLAN.narrow:
        for memory in range(PLAN.narrow):
            pass_memory_back(memory, made, exists, places, backs, d_y, scratch, True, PLAN)
    for memory in range(PLAN.wide):
        pass_memory_back(memory, made, exists, places, backs, d_y, scratch, False, PLAN)
    if PLAN.read == "boundary":
        gradient = load_rows(d_y, exists, PLAN.dim)
        d_q = ask_back(made[2], exists, gradient, places[0][0], backs[0], 0, scratch, False, PLAN)
        add(at.whole(scratch, at.D_Q, PLAN.dim, PLAN), d_q)


@triton.jit
def streams_back(streams, exists, size, boundary, d_start, d_streams, d_logits, scratch, PLAN: tl.constexpr):
    """Store the gradients of a piece's streams, from those of all that was made of them.

    Args:
        boundary: Points to packed weights at the chunk's start.
        d_start: Points to their gradient.
        d_streams: Point to the gradients of the first token's inputs of keys, values and queries.
        d_logits: Point to those of its logits of the gates.
    """
    k = streams[0]
    d_alpha, d_mu = tables_back(size, scratch, PLAN)
    d_k = make_back(k, exists, boundary, d_start, scratch, PLAN.made_k, at.D_K, PLAN)
    put(at.whole(scratch, at.D_K, PLAN.dim, PLAN), d_k)
    rate = tl.load(at.row(scratch, at.RATE, PLAN))
    d_rate = tl.load(at.row(scratch, at.D_RATE, PLAN)) * rate * (1 - rate / PLAN.eta_max)
    make_gate_back(d_rate, k, exists, boundary, d_start, d_logits[0], scratch, PLAN.made_eta, PLAN)
    if PLAN.retention:
        retention = tl.load(at.row(scratch, at.ALPHA, PLAN))
        d_alpha *= retention * (1 - retention)
        make_gate_back(d_alpha, k, exists, boundary, d_start, d_logits[1], scratch, PLAN.made_alpha, PLAN)
    if PLAN.momentum:
        push_retention = tl.load(at.row(scratch, at.MU, PLAN))
        d_mu = (d_mu - tl.load(at.row(scratch, at.D_FRESH, PLAN))) * push_retention * (1 - push_retention)
        make_gate_back(d_mu, k, exists, boundary, d_start, d_logits[2], scratch, -1, PLAN)
    d_k = tl.load(at.whole(scratch, at.D_K, PLAN.dim, PLAN))
    tl.store(tile(d_streams[0], PLAN.rows, PLAN.dim), d_k, mask=exists[:, None])
    d_v = make_back(streams[1], exists, boundary, d_start, scratch, PLAN.made_v, at.D_V, PLAN)
    tl.store(tile(d_streams[1], PLAN.rows, PLAN.dim), d_v, mask=exists[:, None])
    d_q = make_back(streams[2], exists, boundary, d_start, scratch, PLAN.made_q, at.D_Q, PLAN)
    tl.store(tile(d_streams[2], PLAN.rows, PLAN.dim), d_q, mask=exists[:, None])


@triton.jit
def enter_boundary(d_states, d_boundary, PLAN: tl.constexpr):
    """Add the gradient of weights at a chunk's start, as what is asked, to that of weights as what is moved."""
    for begin in range(0, PLAN.size, 1024):
        index = begin + tl.arange(0, 1024)
        inside = index < PLAN.size
        total = tl.load(d_states + index, mask=inside) + tl.load(d_boundary + index, mask=inside)
        tl.debug_barrier()
        tl.store(d_states + index, total, mask=inside)
        tl.store(d_boundary + index, tl.zeros((1024,), tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "chunk_size"])
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
    tokens,
    chunk_size,
    scratch_size,
    PLAN: tl.constexpr,
):
    """Walk back. Gradients of packed weights and momentum after the last token become those before the first.

    Where a chunk has several pieces, all but the last move the memories once more, from what the chunk began with, so
    that there are weights before each of them.
    """
    program = tl.program_id(0).to(tl.int64)
    rows, chunks = tl.arange(0, PLAN.rows), tl.cdiv(tokens, chunk_size)
    scratch += program * scratch_size
    backs = (d_boundary + program * PLAN.size, packed(d_state, d_momentum, program, PLAN))
    replays = program * (tl.cdiv(tl.minimum(chunk_size, tokens), PLAN.rows) - 1)
    for step in range(chunks):
        n = chunks - 1 - step
        boundary = packed(states, momenta, program * (chunks + 1) + n, PLAN)
        pieces = count_pieces(n, tokens, chunk_size, PLAN)
        passes = pieces
        if PLAN.cut:
            passes = 2 * pieces - 1
        for turn in range(passes):
            p = tl.where(turn < passes - pieces, turn, passes - 1 - turn)
            before = boundary
            if PLAN.cut:
                moved = packed(replayed_states, replayed_momenta, replays + p - 1, PLAN)
                before = (tl.where(p > 0, moved[0], boundary[0]), tl.where(p > 0, moved[1], boundary[1]))
            first, size = place_piece(n, p, tokens, chunk_size, PLAN)
            exists, first = rows < size, program * tokens + first
            streams = k + first * PLAN.dim, v + first * PLAN.dim, q + first * PLAN.dim
            logits = gates_at(eta, alpha, mu, first, PLAN)
            made = open_piece(logits, streams, exists, size, boundary[0], scratch, PLAN)
            if PLAN.cut and turn < passes - pieces:
                after = packed(replayed_states, replayed_momenta, replays + p, PLAN)
                pass_memories(made, exists, (boundary, before, after), (d_y, d_y), scratch, False, PLAN)
            else:
                clear_piece(scratch, PLAN)
                out = d_y + first * PLAN.dim
                pass_memories_back(made, exists, (boundary, before), backs, out, scratch, PLAN)
                d_streams = dk + first * PLAN.dim, dv + first * PLAN.dim, dq + first * PLAN.dim
                d_logits = gates_at(d_eta, d_alpha, d_mu, first, PLAN)
                streams_back(streams, exists, size, boundary[0], backs[0], d_streams, d_logits, scratch, PLAN)
            tl.debug_barrier()
        enter_boundary(backs[1][0], backs[0], PLAN)
