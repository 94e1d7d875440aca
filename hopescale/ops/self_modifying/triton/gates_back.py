"""The way back through the tables of a piece of a chunk, to the gates that they are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.triton.matrices import multiply, put
from hopescale.ops.self_modifying.triton.tables import gate_gradient, gate_products


@triton.jit
def written_gradient(retention, scratch, CONFIG: tl.constexpr):
    """Load the gradient of what is left of writes, and of the first momentum, before each token's write."""
    d_write = tl.load(at.table(scratch, at.D_WRITE, CONFIG))
    d_push = tl.load(at.row(scratch, at.D_PUSHED, CONFIG))
    if CONFIG.reading:
        d_write += retention[:, None] * tl.load(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG))
        d_push += retention * tl.load(at.row(scratch, at.D_PUSHED + CONFIG.reading, CONFIG))
    return d_write, d_push


@triton.jit
def add_up_ends(scratch, CONFIG: tl.constexpr):
    """Add up what `carry_back` has gathered: the gradients of what is left at a piece's end."""
    ends, n = tl.arange(0, 4), tl.arange(0, CONFIG.block)
    gathered = tl.load(at.matrix(scratch, at.D_ENDS, CONFIG) + ends[:, None] * CONFIG.block + n[None, :])
    put(scratch + at.D_LAST * CONFIG.rows + ends, tl.sum(gathered, 1))


@triton.jit
def chain_back(scratch, CONFIG: tl.constexpr):
    """Keep the gradients of products of `mu`, in a table and in a row, from those of what is left of writes."""
    d_write, d_push = written_gradient(tl.load(at.row(scratch, at.ALPHA, CONFIG)), scratch, CONFIG)
    kept = tl.load(at.table(scratch, at.KEPT, CONFIG))
    erase = tl.load(at.row(scratch, at.ERASED, CONFIG))
    d_wrote = tl.load(at.row(scratch, at.D_WROTE, CONFIG))
    d_from_start = tl.load(scratch + at.D_LAST * CONFIG.rows + 1) * erase + tl.sum(kept * d_push[:, None], 0)
    d_chain = multiply(tl.trans(kept), d_write, CONFIG, erase[:, None] * d_wrote[None, :])
    if CONFIG.reading:
        d_chain += tl.load(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG))
        d_from_start += tl.load(at.row(scratch, at.D_PUSHED + CONFIG.reading, CONFIG))
    put(at.table(scratch, at.D_PRODUCTS, CONFIG), d_chain)
    put(at.row(scratch, at.D_MU, CONFIG), d_from_start)


@triton.jit
def momentum_gate_back(scratch, CONFIG: tl.constexpr):
    """Keep the gradient of the log of `mu`, from those of its products and of the weights at the end."""
    last = scratch + at.D_LAST * CONFIG.rows
    d_pushed, d_momentum_decay = tl.load(last + 1), tl.load(last + 2)
    d_wrote = tl.load(at.row(scratch, at.D_WROTE, CONFIG))
    chain, from_start = gate_products(at.MU, 0, scratch, CONFIG)
    at.add_row(scratch, at.D_ERASED, tl.sum(chain * d_wrote[None, :], 1) + d_pushed * from_start, CONFIG)
    links = tl.load(at.row(scratch, at.LINK, CONFIG)) * tl.load(at.row(scratch, at.D_LINK, CONFIG))
    spanning, gate = tl.load(at.table(scratch, at.D_PRODUCTS, CONFIG)) * chain, tl.load(at.row(scratch, at.MU, CONFIG))
    of_all = d_momentum_decay * tl.load(scratch + at.LAST * CONFIG.rows + 2)
    of_reads = tl.sum(spanning, 1) + tl.load(at.row(scratch, at.D_MU, CONFIG)) * from_start
    d_mu = gate_gradient(of_reads, tl.sum(spanning, 0), links, of_all, gate, 0, CONFIG)
    put(at.row(scratch, at.D_MU, CONFIG), d_mu)


@triton.jit
def kept_back(scratch, CONFIG: tl.constexpr):
    """Keep the gradients of products of `alpha`, in a table and in a row, from those of what is left before a write."""
    d_write, d_push = written_gradient(tl.load(at.row(scratch, at.ALPHA, CONFIG)), scratch, CONFIG)
    d_kept, d_start = tl.load(at.table(scratch, at.D_KEPT, CONFIG)), tl.load(at.row(scratch, at.D_START, CONFIG))
    if CONFIG.momentum:
        chain, from_start = gate_products(at.MU, 0, scratch, CONFIG)
        d_kept = multiply(d_write, tl.trans(chain), CONFIG, d_kept) + d_push[:, None] * from_start[None, :]
    else:  # writes and erases weigh the same
        d_kept, d_start = d_kept + d_write, d_start + d_push
    put(at.table(scratch, at.D_PRODUCTS, CONFIG), d_kept)
    put(at.row(scratch, at.D_ALPHA, CONFIG), d_start)


@triton.jit
def retention_back(scratch, CONFIG: tl.constexpr):
    """Keep the gradient of the log of `alpha`, from those of its products and of the weights at the end."""
    retention = tl.load(at.row(scratch, at.ALPHA, CONFIG))
    d_kept, d_start = tl.load(at.table(scratch, at.D_PRODUCTS, CONFIG)), tl.load(at.row(scratch, at.D_ALPHA, CONFIG))
    d_erase = tl.load(at.row(scratch, at.D_ERASED, CONFIG))
    if not CONFIG.momentum:
        d_erase += tl.load(at.row(scratch, at.D_WROTE, CONFIG))
    kept, start = tl.load(at.table(scratch, at.KEPT, CONFIG)), tl.load(at.row(scratch, at.START, CONFIG))
    direct = tl.zeros_like(d_start)
    if CONFIG.reading:
        read_kept = tl.load(at.table(scratch, at.D_KEPT + CONFIG.reading, CONFIG))
        read_start = tl.load(at.row(scratch, at.D_START + CONFIG.reading, CONFIG))
        direct = tl.sum(read_kept * kept, 1) + read_start * start
        read_write = tl.load(at.table(scratch, at.D_WRITE + CONFIG.reading, CONFIG))
        read_push = tl.load(at.row(scratch, at.D_PUSHED + CONFIG.reading, CONFIG))
        write, push = tl.load(at.table(scratch, at.WRITE, CONFIG)), tl.load(at.row(scratch, at.PUSHED, CONFIG))
        direct = retention * (direct + tl.sum(read_write * write, 1) + read_push * push)
        d_kept, d_start = d_kept + retention[:, None] * read_kept, d_start + retention * read_start
    spanning, erases = d_kept * kept, tl.load(at.row(scratch, at.ERASED, CONFIG)) * d_erase
    of_all = tl.load(scratch + at.D_LAST * CONFIG.rows) * tl.load(scratch + at.LAST * CONFIG.rows)
    of_reads = tl.sum(spanning, 1) + d_start * start
    d_alpha = gate_gradient(of_reads, tl.sum(spanning, 0), erases, of_all, retention, 1, CONFIG)
    put(at.row(scratch, at.D_ALPHA, CONFIG), d_alpha + direct)
