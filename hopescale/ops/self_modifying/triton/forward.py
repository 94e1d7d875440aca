"""The forward kernel: one program walks the chunks of one head of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import tile
from hopescale.ops.self_modifying.triton.memories import ask, gates_at
from hopescale.ops.self_modifying.triton.pieces import (
    count_pieces,
    open_piece,
    packed,
    pass_memories,
    place_piece,
)


@triton.jit(do_not_specialize=["tokens", "chunk_size"])
def self_modify_kernel(
    k,
    v,
    q,
    eta,
    alpha,
    mu,
    states,
    momenta,
    y,
    seen,
    scratch,
    tokens,
    chunk_size,
    scratch_size,
    PLAN: tl.constexpr,
):
    """Walk the chunks. Packed weights and momentum before chunk `n` are read from place `n`, and stored at `n + 1`."""
    program = tl.program_id(0).to(tl.int64)
    rows, chunks = tl.arange(0, PLAN.rows), tl.cdiv(tokens, chunk_size)
    scratch += program * scratch_size
    for n in range(chunks):
        place = program * (chunks + 1) + n
        boundary, after = packed(states, momenta, place, PLAN), packed(states, momenta, place + 1, PLAN)
        for p in range(count_pieces(n, tokens, chunk_size, PLAN)):
            before = packed(states, momenta, place + tl.minimum(p, 1), PLAN)
            first, size = place_piece(n, p, tokens, chunk_size, PLAN)
            exists, first = rows < size, program * tokens + first
            streams = k + first * PLAN.dim, v + first * PLAN.dim, q + first * PLAN.dim
            logits = gates_at(eta, alpha, mu, first, PLAN)
            made = open_piece(logits, streams, exists, size, boundary[0], scratch, PLAN)
            out, report = y + first * PLAN.dim, seen + 3 * first
            tl.store(report + 3 * rows, tl.load(at.row(scratch, at.RATE, PLAN)), mask=exists)
            tl.store(report + 3 * rows + 1, tl.load(at.row(scratch, at.ALPHA, PLAN)), mask=exists)
            pass_memories(made, exists, (boundary, before, after), (out, report + 2), scratch, True, PLAN)
            if PLAN.read == "boundary":
                found = ask(made[2], exists, boundary[0], 0, scratch, False, PLAN)
                tl.store(tile(out, PLAN.rows, PLAN.dim), found, mask=exists[:, None])
            tl.debug_barrier()
