"""The forward kernel: one program walks the chunks of one head of one document."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import tile
from hopescale.ops.self_modifying.triton.memories import retrieve, tokens_at
from hopescale.ops.self_modifying.triton.pieces import (
    choose,
    copy_slot,
    copy_weights,
    count_pieces,
    open_piece,
    packed,
    pass_memories,
    place_document,
    place_of_scratch,
    place_piece,
)


@triton.jit
def carried_at(carried, carried_momenta, program, n, CONFIG: tl.constexpr):
    """Point to the weights and the momentum that chunk `n` begins with, and to those after it, of a program.

    A chunk of one piece moves them in place, since all that is asked of a memory is asked before.
    """
    slot, after = program, program
    if CONFIG.cut:
        slot, after = 2 * program + n % 2, 2 * program + (n + 1) % 2
    return packed(carried, carried_momenta, slot, CONFIG), packed(carried, carried_momenta, after, CONFIG)


@triton.jit
def place_end(program, bounds, heads, tokens):
    """Return where what a program ends with is stored, and whether its document is the last one of a row."""
    _, head, place, length = place_document(program, bounds, heads, tokens)
    row = place // tokens
    return row * heads + head, place + length == (row + 1) * tokens


@triton.jit
def keep_slot(
    n, program, here, kept, kept_momenta, bounds, heads, tokens, chunk_size, slots, numbers, CONFIG: tl.constexpr
):  # fmt: skip
    """Keep packed weights and momentum at the start of chunk `n`, where a group of chunks begins, but not the first."""
    if (n > 0) & (n % CONFIG.keeps == 0):
        _, head, place, _ = place_document(program, bounds, heads, tokens)
        slot = head * slots + place // (CONFIG.keeps * chunk_size) - 1 + n // CONFIG.keeps
        copy_slot(here, packed(kept, kept_momenta, slot, CONFIG), numbers, CONFIG)


@triton.jit
def pass_chunk(
    n, streams, logits, out, slots, token, length, chunk_size, scratch, READ: tl.constexpr, CONFIG: tl.constexpr
):
    """Move memories over chunk `n`; with `READ` read the first one on the way, and keep statistics.

    Args:
        streams: Pointers to inputs of keys, values and queries of all tokens.
        logits: Pointers to logits of the gates of all tokens.
        out: Pointers to outputs and statistics.
        slots: Pointers to packed weights and momentum at the chunk's start and after it.
        token: Place of the document's first token.
        length: Number of its tokens.
    """
    boundary, after = slots
    rows = tl.arange(0, CONFIG.rows)
    pieces = 1
    if CONFIG.cut:
        pieces = count_pieces(n, length, chunk_size, CONFIG)
    for p in tl.range(0, pieces, disable_licm=True):
        before = boundary
        if CONFIG.cut:
            before = choose(p == 0, boundary, after)
        first, size = place_piece(n, p, length, chunk_size, CONFIG)
        exists, first = rows < size, token + first
        open_piece(logits, streams, first, exists, size, boundary[0], scratch, False, CONFIG)
        if READ:
            report = out[1] + 3 * first
            tl.store(report + 3 * rows, tl.load(at.row(scratch, at.RATE, CONFIG)), mask=exists)
            tl.store(report + 3 * rows + 1, tl.load(at.row(scratch, at.ALPHA, CONFIG)), mask=exists)
            if CONFIG.spec.read == "boundary":
                VECTORS: tl.constexpr = CONFIG.vectors
                _, _, q = tokens_at(streams, first, scratch, CONFIG)
                found = retrieve(q, exists, boundary[0], 0, scratch, VECTORS, CONFIG)
                y = out[0] + first * CONFIG.dim
                tl.store(tile(y, CONFIG.rows, CONFIG.dim), found, mask=exists[:, None])
        pass_memories(streams, first, exists, (boundary, before, after), out, scratch, READ, CONFIG)
        tl.debug_barrier()


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
    carried,
    carried_momenta,
    kept,
    kept_momenta,
    last,
    last_momenta,
    boundaries,
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
    numbers,
    scratch_size,
    CONFIG: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Walk the chunks from the packed weights and momentum that are given; they are carried in float32.

    Stored are, of each row's last document, those after the last token and the weights that its chunk began with; and
    with `KEEP` those that every `KERNEL_KEEPS`-th chunk begins with, but for the first.
    """
    local = tl.program_id(0).to(tl.int64)
    scratch += local * scratch_size
    _, head, place, length = place_document(begin + local, bounds, heads, tokens)
    row = place // tokens
    source = packed(given, given_momenta, row * row_step + head, CONFIG)
    chunks, token = tl.cdiv(length, chunk_size), (row * heads + head) * tokens + place - row * tokens
    logits = eta, alpha, mu
    start, _ = carried_at(carried, carried_momenta, local, 0, CONFIG)
    copy_slot(source, start, numbers, CONFIG)
    for number in tl.range(0, chunks, disable_licm=True):
        n = at.opaque(number, scratch)
        here, after = carried_at(carried, carried_momenta, local, n, CONFIG)
        # Where a program is in its document is found anew: it would fill registers all the way.
        program = begin + at.opaque(tl.program_id(0), scratch).to(tl.int64)
        if KEEP:
            keep_slot(n, program, here, kept, kept_momenta, bounds, heads, tokens, chunk_size, slots, numbers, CONFIG)
        if n == chunks - 1:
            last_slot, ends_row = place_end(program, bounds, heads, tokens)
            if ends_row:
                copy_weights(here[0], boundaries + last_slot * CONFIG.size, numbers)
                tl.debug_barrier()
        there = place_of_scratch(scratch, n)
        out, moved = (y, stats), (here, after)
        pass_chunk(n, (k, v, q), logits, out, moved, token, length, chunk_size, there, True, CONFIG)
    last_slot, ends_row = place_end(begin + tl.program_id(0).to(tl.int64), bounds, heads, tokens)
    if ends_row:
        end, _ = carried_at(carried, carried_momenta, local, chunks, CONFIG)
        copy_slot(end, packed(last, last_momenta, last_slot, CONFIG), numbers, CONFIG)
