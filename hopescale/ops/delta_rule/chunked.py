"""The closed form of a chunk: matrix products and triangular solves. README.md derives it.

The parts (`chunk_tables`, `open_chunk`, `read_chunk`, `write_chunk`) work on `[..., C, .]` with heads before tokens and
broadcast over leading dimensions, so that memories which share keys and gates share the tables and the solve. They take
states and momenta transposed, `[..., D, Do]`: products with small matrices from the left are the fast ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read, check_arguments


class Weighting(NamedTuple):
    """What a state at each token of a chunk is made of. Rows are reading tokens, columns writing tokens.

    Attributes:
        start: Weight of the chunk's first state `[..., C]`.
        push: Weight of the chunk's first momentum `[..., C]`; None without momentum.
        write: Weight of each write value, its `eta` included `[..., C, C]`.
        erase: Weight of what each write erased, its `eta` included; equals `write` without momentum.
    """

    start: Tensor
    push: Tensor | None
    write: Tensor
    erase: Tensor


class ChunkTables(NamedTuple):
    """Weights of one chunk, in the type of the state. Row `t` is of the state before token `t`, the last of the end.

    Attributes:
        start: As in `Weighting`, `[..., C + 1]`.
        push: The same; None without momentum.
        write: The same, `[..., C + 1, C]`; equals `erase` without momentum.
        erase: The same.
        last_push: Weight of each write value in the last momentum, its `eta` included `[..., C]`; None without.
        push_kept: Weight of the first momentum in the last one `[...]`; None without.
    """

    start: Tensor
    push: Tensor | None
    write: Tensor
    erase: Tensor
    last_push: Tensor | None
    push_kept: Tensor | None

    @property
    def before(self) -> Weighting:
        """Weights of the state before each token's own write, `S_{t-1}`."""
        return self._rows(slice(-1))

    @property
    def after(self) -> Weighting:
        """Weights of the state after it, `S_t`."""
        return self._rows(slice(1, None))

    def _rows(self, rows: slice) -> Weighting:
        push = None if self.push is None else self.push[..., rows]
        return Weighting(self.start[..., rows], push, self.write[..., rows, :], self.erase[..., rows, :])

    def map(self, function: Callable[[Tensor], Tensor]) -> ChunkTables:
        """Apply a function to every table."""
        return ChunkTables(*(None if table is None else function(table) for table in self))


class _Ratios(torch.autograd.Function):
    """Products of a gate between two tokens, from its logs `[..., C]`: `[..., C + 1, C]`.

    Entry `(t, s)` is `prod_{s < r < t} gate_r`, 0 for `s >= t`: row t describes the state before token t's write.
    """

    @staticmethod
    def forward(ctx: Any, log_gate: Tensor) -> Tensor:
        size = log_gate.shape[-1]
        # The logs are summed from s on, never subtracted as two long sums, so that one tiny gate costs no precision.
        steps = log_gate[..., None].expand(*log_gate.shape, size).tril(-1).cumsum_(-2).exp_().tril_()
        products = F.pad(steps, (0, 0, 1, 0))
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (products,) = ctx.saved_tensors
        share = grad * products
        # The log of gate r is in every entry with s < r < t.
        entering = share.sum(-1)[..., 1:] - share.sum(-2)
        return entering.flip(-1).cumsum_(-1).flip(-1)


def _log(gate: Tensor) -> Tensor:
    return gate.clamp_min(torch.finfo(gate.dtype).tiny).log()


def chunk_tables(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> ChunkTables:
    """Compute the tables of one chunk from its gates, each `[..., C]`; `alpha` and `mu` in `[0, 1]`."""
    log_alpha = _log(alpha)
    kept = _Ratios.apply(log_alpha)
    start = F.pad(log_alpha.cumsum(-1), (1, 0)).exp()
    erase = kept * eta[..., None, :]
    push = last_push = push_kept = None
    if mu is None:
        write = erase
    else:
        log_mu = _log(mu)
        chain = _Ratios.apply(log_mu)[..., 1:, :] * eta[..., None, :]
        from_start = log_mu.cumsum(-1).exp()
        write, push = kept @ chain, (kept @ from_start[..., None])[..., 0]
        last_push, push_kept = chain[..., -1, :], from_start[..., -1]
    return ChunkTables(start, push, write, erase, last_push, push_kept)


class Chunk(NamedTuple):
    """One chunk of a linear memory, before it is known what is written.

    Attributes:
        tables: Of this chunk, broadcastable to the leading dimensions.
        k: Keys `[..., C, D]`.
        system: `before.erase * K K^T` `[..., C, C]`, by how much a key erases what an earlier one wrote; None if writes
            do not erase.
        written: `before.write * K K^T`; `system` itself without momentum.
        erased: What the last state loses for each value that a key reads, `[..., C, D]`; None if writes do not erase.
    """

    tables: ChunkTables
    k: Tensor
    system: Tensor | None
    written: Tensor | None
    erased: Tensor | None


class Values(NamedTuple):
    """What is written in one chunk.

    Attributes:
        written: Write values `[..., C, Do]`. Without momentum, what the keys read of the first state is taken off
            where writes erase: then they are all that enters.
        read: With momentum and erase, what each key reads had nothing of the chunk been erased `[..., C, Do]`.
    """

    written: Tensor
    read: Tensor | None


def open_chunk(tables: ChunkTables, k: Tensor, *, erase: bool) -> Chunk:
    """Solve for how what the keys `k` `[..., C, D]` erase spreads over the chunk."""
    if not erase:
        return Chunk(tables, k, None, None, None)
    before, last = tables.before, tables.after.erase[..., -1, :, None]
    similar = k @ k.mT  # [..., C, C]
    system = before.erase * similar
    written = system if before.push is None else before.write * similar
    erased = torch.linalg.solve_triangular(system.mT, last * k, upper=True, unitriangular=True)
    return Chunk(tables, k, system, written, erased)


def _carried(weighting: Weighting, x: Tensor, state: Tensor, momentum: Tensor | None) -> Tensor:
    """What `x` `[..., C, D]` reads of the chunk's first state and momentum `[..., D, Do]`: `[..., C, Do]`."""
    read = weighting.start[..., None] * (x @ state)
    return read if momentum is None else torch.addcmul(read, weighting.push[..., None], x @ momentum)


def chunk_values(chunk: Chunk, u: Tensor, state: Tensor, momentum: Tensor | None) -> Values:
    """Put write values `u` `[..., C, Do]` in the form in which they are read and written.

    Args:
        chunk: Keys and weights.
        u: Write values.
        state: Memory at the chunk's first token, transposed `[..., D, Do]`.
        momentum: Likewise; None without momentum.
    """
    if chunk.erased is None:
        return Values(u, None)
    read = _carried(chunk.tables.before, chunk.k, state, momentum)
    return Values(u - read, None) if momentum is None else Values(u, read + chunk.written @ u)


def read_chunk(chunk: Chunk, q: Tensor, values: Values, state: Tensor, momentum: Tensor | None, read: Read) -> Tensor:
    """Read the memory with one query per token, `q` like the keys; state and momentum as in `chunk_values`.

    Args:
        read: `prefix` (state before the token's write) or `inclusive` (after it).

    Returns:
        Read values `[..., C, Do]`.
    """
    weighting = chunk.tables.before if read == "prefix" else chunk.tables.after
    similar = q @ chunk.k.mT
    output = _carried(weighting, q, state, momentum)
    if chunk.erased is None:
        return output + (weighting.write * similar) @ values.written
    erased = torch.linalg.solve_triangular(
        chunk.system, weighting.erase * similar, upper=False, left=False, unitriangular=True
    )
    if momentum is None:
        return output + erased @ values.written
    return output + (weighting.write * similar) @ values.written - erased @ values.read


def write_chunk(chunk: Chunk, values: Values, state: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return memory and momentum after the chunk's last token. Arguments as in `read_chunk`."""
    after = chunk.tables.after
    last = chunk.erased if momentum is None and chunk.erased is not None else after.write[..., -1, :, None] * chunk.k
    moved = _plus_product(after.start[..., -1, None, None] * state, last.mT, values.written)
    if momentum is None:
        return moved, None
    moved = torch.addcmul(moved, after.push[..., -1, None, None], momentum)
    if values.read is not None:
        moved = _plus_product(moved, chunk.erased.mT, values.read, sign=-1)
    return moved, _pushed(chunk, values.written, momentum)


def _pushed(chunk: Chunk, u: Tensor, momentum: Tensor) -> Tensor:
    tables = chunk.tables
    return _plus_product(tables.push_kept[..., None, None] * momentum, (tables.last_push[..., None] * chunk.k).mT, u)


def _plus_product(x: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> Tensor:
    """Return `x + sign * left @ right`, all with the same leading dimensions, in one pass over `x`."""
    parts = (part.flatten(0, -3) for part in (x, left, right))
    return torch.baddbmm(*parts, alpha=sign).view(x.shape)


class Transition(NamedTuple):
    """How a chunk moves the state: `state @ S_0 + momentum @ Z_0 + values @ U`, with `S_0` and `Z_0` transposed.

    Attributes:
        state: `[..., D, D]`.
        momentum: The same; None without momentum.
        values: `[..., D, C]`.
    """

    state: Tensor
    momentum: Tensor | None
    values: Tensor


def transition(chunk: Chunk) -> Transition:
    """Return the matrices that move states over a chunk: worth their cost if a memory has more outputs than inputs."""
    after, before, k = chunk.tables.after, chunk.tables.before, chunk.k
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    state = after.start[..., -1, None, None] * identity
    momentum = None if after.push is None else after.push[..., -1, None, None] * identity
    if chunk.erased is None:
        return Transition(state, momentum, (after.write[..., -1, :, None] * k).mT)
    lost = chunk.erased.mT  # [..., D, C]
    state = state - lost @ (before.start[..., None] * k)
    if momentum is None:
        return Transition(state, None, lost)
    momentum = momentum - lost @ (before.push[..., None] * k)
    return Transition(state, momentum, (after.write[..., -1, :, None] * k).mT - lost @ chunk.written)


def move(
    chunk: Chunk, by: Transition, u: Tensor, state: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Do what `write_chunk` does, with write values `u` and a transition."""
    moved = _plus_product(by.values @ u, by.state, state)
    if momentum is None:
        return moved, None
    return _plus_product(moved, by.momentum, momentum), _pushed(chunk, u, momentum)


def delta_rule_chunked(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: Tensor,
    *,
    q: Tensor | None = None,
    mu: Tensor | None = None,
    momentum: Tensor | None = None,
    erase: bool = True,
    read: Read = "prefix",
    chunk_size: int = 64,
) -> DeltaRuleOutput:
    """Run the gated delta rule a chunk at a time. Same arguments, result and errors as `delta_rule`.

    Everything but the states is computed for all chunks at once; only they are carried from chunk to chunk.
    """
    check_arguments(k, u, eta, alpha, state, q, mu, momentum, read, chunk_size)
    kind, tokens = state.dtype, k.shape[1]
    out_type = (q if q is not None else k).dtype
    if mu is not None and momentum is None:
        momentum = torch.zeros_like(state)
    state, momentum = state.mT, None if momentum is None else momentum.mT
    whole = tokens - tokens % chunk_size
    outputs = []
    for begin, end, size in ((0, whole, chunk_size), (whole, tokens, tokens - whole)):
        if begin == end:
            continue

        def in_chunks(x: Tensor | None, begin: int = begin, end: int = end, size: int = size) -> Tensor | None:
            return None if x is None else x[:, begin:end].to(kind).transpose(1, 2).unflatten(2, (-1, size))

        inputs = map(in_chunks, (k, u, eta, alpha, mu, q))
        output, state, momentum = _run(*inputs, state, momentum, erase=erase, read=read)
        if q is not None:
            outputs.append(output.flatten(2, 3))
    output = None
    if q is not None:
        output = torch.cat(outputs, dim=2) if outputs else u.new_zeros(u.shape).transpose(1, 2)
        output = output.transpose(1, 2).to(out_type)  # [B, T, H, Do]
    return DeltaRuleOutput(output, state.mT, None if momentum is None else momentum.mT)


def _run(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    mu: Tensor | None,
    q: Tensor | None,
    state: Tensor,
    momentum: Tensor | None,
    *,
    erase: bool,
    read: Read,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Run chunks of one length: inputs `[B, H, N, C, ...]`, memories `[B, H, D, Do]`, outputs `[B, H, N, C, Do]`."""
    chunk = open_chunk(chunk_tables(eta, alpha, mu), k, erase=erase)
    by = transition(chunk)
    moves = [repeat(None) if x is None else x.unbind(2) for x in (by.values @ u, *by[:2], *_pushes(chunk, u))]
    states, momenta = [], []
    for entering, keep, push, pushed, push_kept in zip(*moves, strict=False):
        states.append(state)
        momenta.append(momentum)
        state = _plus_product(entering, keep, state)
        if momentum is not None:
            state = _plus_product(state, push, momentum)
            momentum = torch.addcmul(pushed, push_kept[..., None, None], momentum)
    if q is None:
        return None, state, momentum
    first, pushing = torch.stack(states, 2), None if momentum is None else torch.stack(momenta, 2)
    if read == "boundary":
        return q @ first, state, momentum
    return read_chunk(chunk, q, chunk_values(chunk, u, first, pushing), first, pushing, read), state, momentum


def _pushes(chunk: Chunk, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What enters the momentum in a chunk, and how much of it is kept."""
    tables = chunk.tables
    if tables.last_push is None:
        return None, None
    return (tables.last_push[..., None] * chunk.k).mT @ u, tables.push_kept
