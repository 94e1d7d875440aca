"""The forward kernel: one program walks the chunks of one head of one document."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import tile
from hopescale.ops.self_modifying.triton.memories import gates_at, retrieve
from hopescale.ops.self_modifying.triton.pieces import (
    choose,
    count_pieces,
    open_piece,
    packed,
    pass_memories,
    place_document,
    place_piece,
)


@triton.jit(do_not_specialize=["begin", "heads", "row_step", "tokens", "chunk_size", "slots"])
def self_modify_kernel(
    k,
    v,
    q,
    eta,
    alpha,
    mu,
    given,
    given_momenta,
    states,
    momenta,
    y,
    stats,
    scratch,
    bounds,
    begin,
    heads,
    row_step,
    tokens,
    chunk_size,
    slots,
    scratch_size,
    CONFIG: tl.constexpr,
):
    """Walk the chunks. Packed weights and momentum before the first are given, those after each are stored in a row."""
    program = begin + tl.program_id(0).to(tl.int64)
    scratch += tl.program_id(0).to(tl.int64) * scratch_size
    token, length, source, slot = place_document(program, bounds, heads, row_step, tokens, chunk_size, slots)
    start = packed(given, given_momenta, source, CONFIG)
    rows = tl.arange(0, CONFIG.rows)
    for n in range(tl.cdiv(length, chunk_size)):
        after = packed(states, momenta, slot + n, CONFIG)
        boundary = choose(n == 0, start, packed(states, momenta, slot + tl.maximum(n, 1) - 1, CONFIG))
        for p in range(count_pieces(n, length, chunk_size, CONFIG)):
            before = choose(p == 0, boundary, after)
            first, size = place_piece(n, p, length, chunk_size, CONFIG)
            exists, first = rows < size, token + first
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
