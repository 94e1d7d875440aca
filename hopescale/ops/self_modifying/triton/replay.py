"""The kernel that makes the states again which the forward kernel kept not: groups of chunks side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.forward import carried_at, pass_chunk
from hopescale.ops.self_modifying.triton.pieces import copy_slot, packed, place_document, place_of_scratch


@triton.jit(do_not_specialize=["begin", "heads", "row_step", "tokens", "chunk_size", "kept_slots", "slots"])
def replay_kernel(
    k,
    v,
    q,
    eta,
    alpha,
    mu,
    given,
    given_momenta,
    kept,
    kept_momenta,
    carried,
    carried_momenta,
    states,
    momenta,
    scratch,
    bounds,
    begin,
    heads,
    row_step,
    tokens,
    chunk_size,
    kept_slots,
    slots,
    numbers,
    scratch_size,
    CONFIG: tl.constexpr,
):
    """Store the packed weights and momentum that the chunks of a group begin with, from those of its first one.

    A program has a group of `KERNEL_KEEPS` chunks of a head of a document, by the second number of the grid.
    """
    group = tl.program_id(1)
    local = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group
    scratch += local * scratch_size
    number, head, place, length = place_document(begin + tl.program_id(0).to(tl.int64), bounds, heads, tokens)
    row, chunks = place // tokens, tl.cdiv(length, chunk_size)
    token = (row * heads + head) * tokens + place - row * tokens
    keeps = head * kept_slots + place // (CONFIG.keeps * chunk_size) - 1
    slot = head * slots + place // chunk_size + number
    logits = eta, alpha, mu
    first, end = group * CONFIG.keeps, tl.minimum((group + 1) * CONFIG.keeps, chunks)
    if first < end:
        start, _ = carried_at(carried, carried_momenta, local, first, CONFIG)
        if group == 0:
            copy_slot(packed(given, given_momenta, row * row_step + head, CONFIG), start, numbers, CONFIG)
        else:
            copy_slot(packed(kept, kept_momenta, keeps + group, CONFIG), start, numbers, CONFIG)
    for turn in tl.range(first, end, disable_licm=True):
        n = at.opaque(turn, scratch)
        here, after = carried_at(carried, carried_momenta, local, n, CONFIG)
        copy_slot(here, packed(states, momenta, slot + n, CONFIG), numbers, CONFIG)
        if n + 1 < end:
            there, out, moved = place_of_scratch(scratch, n), (k, k), (here, after)
            pass_chunk(n, (k, v, q), logits, out, moved, token, length, chunk_size, there, False, CONFIG)
