"""The forward kernel: one program walks the chunks of one head of one sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import tile
from hopescale.ops.self_modifying.triton.memories import gates_at, retrieve
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
    stats,
    scratch,
    tokens,
    chunk_size,
    scratch_size,
    CONFIG: tl.constexpr,
):
    """Walk the chunks. Packed weights and momentum before chunk `n` are read from place `n`, and stored at `n + 1`."""
    program = tl.program_id(0).to(tl.int64)
    rows, chunks = tl.arange(0, CONFIG.rows), tl.cdiv(tokens, chunk_size)
    scratch += program * scratch_size
    for n in range(chunks):
        slot = program * (chunks + 1) + n
        boundary, after = packed(states, momenta, slot, CONFIG), packed(states, momenta, slot + 1, CONFIG)
        for p in range(count_pieces(n, tokens, chunk_size, CONFIG)):
            before = packed(states, momenta, slot + tl.minimum(p, 1), CONFIG)
            first, size = place_piece(n, p, tokens, chunk_size, CONFIG)
            exists, first = rows < size, program * tokens + first
            streams = k + first * CONFIG.dim, v + first * CONFIG.dim, q + first * CONFIG.dim
            logits = gates_at(eta, alpha, mu, first, CONFIG)
            inputs = open_piece(logits, streams, exists, size, boundary[0], scratch, CONFIG)
            out, report = y + first * CONFIG.dim, stats + 3 * first
            tl.store(report + 3 * rows, tl.load(at.row(scratch, at.RATE, CONFIG)), mask=exists)
            tl.store(report + 3 * rows + 1, tl.load(at.row(scratch, at.ALPHA, CONFIG)), mask=exists)
            pass_memories(inputs, exists, (boundary, before, after), (out, report + 2), scratch, True, CONFIG)
            if CONFIG.spec.read == "boundary":
                VECTORS: tl.constexpr = CONFIG.vectors
                found = retrieve(inputs[2], exists, boundary[0], 0, scratch, VECTORS, CONFIG)
                tl.store(tile(out, CONFIG.rows, CONFIG.dim), found, mask=exists[:, None])
            tl.debug_barrier()
