"""The closed form of a chunk: matrix products and one triangular solve. README.md derives it.

The parts (`chunk_tables`, `predict`, `read_chunk`, `write_chunk`) work on `[..., C, .]` with heads before tokens and
broadcast over leading dimensions, so that memories which share keys and gates share the tables and the solve.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import torch
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
    """Weights of one chunk, in the type of the state.

    Attributes:
        before: Of the state before each token's own write, `S_{t-1}`.
        after: Of the state after it, `S_t`.
        last_push: Weight of each write value in the last momentum, its `eta` included `[..., C]`; None without.
        push_kept: Weight of the first momentum in the last one `[...]`; None without.
    """

    before: Weighting
    after: Weighting
    last_push: Tensor | None
    push_kept: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> ChunkTables:
        """Apply a function to every table."""

        def apply(part: Tensor | Weighting | None) -> Tensor | Weighting | None:
            return (
                Weighting(*map(apply, part))
                if isinstance(part, Weighting)
                else None
                if part is None
                else function(part)
            )

        return ChunkTables(*map(apply, self))


def _log(gate: Tensor) -> Tensor:
    return gate.clamp_min(torch.finfo(gate.dtype).tiny).log()


def _ratios(log_gate: Tensor) -> Tensor:
    """Products of a gate between two tokens: entry `(t, s)` is `prod_{s < r <= t}` of it, 0 above the diagonal.

    The logs are summed from `s` on, never subtracted as two long sums, so that one tiny gate costs no precision.
    """
    size = log_gate.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_gate.device).tril()
    steps = log_gate[..., None].expand(*log_gate.shape, size).masked_fill(~lower.tril(-1), 0.0)
    return steps.cumsum(-2).exp().masked_fill(~lower, 0.0)


def _shift(table: Tensor, first: float, dim: int) -> Tensor:
    """Move the rows down by one, so that row t describes the state before token t's own write."""
    head = table.narrow(dim, 0, 1)
    return torch.cat([torch.full_like(head, first), table.narrow(dim, 0, table.shape[dim] - 1)], dim=dim)


def chunk_tables(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> ChunkTables:
    """Compute the tables of one chunk from its gates, each `[..., C]`; `alpha` and `mu` in `[0, 1]`."""
    log_alpha = _log(alpha)
    kept, start = _ratios(log_alpha), log_alpha.cumsum(-1).exp()
    erase = kept * eta[..., None, :]
    push = last_push = push_kept = None
    if mu is None:
        write = erase
    else:
        log_mu = _log(mu)
        chain = _ratios(log_mu) * eta[..., None, :]
        from_start = log_mu.cumsum(-1).exp()
        write, push = kept @ chain, (kept @ from_start[..., None])[..., 0]
        last_push, push_kept = chain[..., -1, :], from_start[..., -1]
    after = Weighting(start, push, write, erase)
    shifted = _shift(erase, 0.0, -2)
    before = Weighting(
        _shift(start, 1.0, -1),
        None if push is None else _shift(push, 0.0, -1),
        shifted if write is erase else _shift(write, 0.0, -2),
        shifted,
    )
    return ChunkTables(before, after, last_push, push_kept)


def _carried(weighting: Weighting, x: Tensor, state: Tensor, momentum: Tensor | None) -> Tensor:
    """What `x` `[..., C, D]` reads of the chunk's first state and momentum: `[..., C, Do]`."""
    read = weighting.start[..., None] * (x @ state.mT)
    return read if momentum is None else torch.addcmul(read, weighting.push[..., None], x @ momentum.mT)


def predict(tables: ChunkTables, k: Tensor, u: Tensor, state: Tensor, momentum: Tensor | None) -> Tensor:
    """Solve for what the memory held under each key just before that token wrote: `P_t = S_{t-1} k_t`.

    Args:
        tables: Of this chunk, broadcastable to the leading dimensions.
        k: Keys `[..., C, D]`.
        u: Write values `[..., C, Do]`.
        state: Memory at the chunk's first token `[..., Do, D]`.
        momentum: Likewise; None without momentum.

    Returns:
        `P`, shape `[..., C, Do]`.
    """
    before = tables.before
    similar = k @ k.mT  # [..., C, C]
    erase = before.erase * similar
    write = erase if before.write is before.erase else before.write * similar
    right = _carried(before, k, state, momentum) + write @ u
    return torch.linalg.solve_triangular(erase, right, upper=False, unitriangular=True)


def read_chunk(
    tables: ChunkTables,
    k: Tensor,
    q: Tensor,
    u: Tensor,
    held: Tensor | None,
    state: Tensor,
    momentum: Tensor | None,
    read: Read,
) -> Tensor:
    """Read the memory with one query per token. Shapes as in `predict`, `q` like `k`.

    Args:
        held: Result of `predict`; None when writes do not erase.
        read: `prefix` (state before the token's write) or `inclusive` (after it).

    Returns:
        Read values `[..., C, Do]`.
    """
    weighting = tables.before if read == "prefix" else tables.after
    similar = q @ k.mT
    output = _carried(weighting, q, state, momentum)
    if held is None:
        return output + (weighting.write * similar) @ u
    if weighting.write is weighting.erase:
        return output + (weighting.erase * similar) @ (u - held)
    return output + (weighting.write * similar) @ u - (weighting.erase * similar) @ held


def write_chunk(
    tables: ChunkTables, k: Tensor, u: Tensor, held: Tensor | None, state: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return memory and momentum after the chunk's last token. Shapes as in `predict` and `read_chunk`."""
    last = tables.after
    values = last.write[..., -1, :, None] * u  # [..., C, Do]
    if held is not None:
        values = values - last.erase[..., -1, :, None] * held
    after = torch.addcmul(values.mT @ k, last.start[..., -1, None, None], state)
    if momentum is None:
        return after, None
    after = torch.addcmul(after, last.push[..., -1, None, None], momentum)
    pushes = (tables.last_push[..., None] * u).mT @ k
    return after, torch.addcmul(pushes, tables.push_kept[..., None, None], momentum)


def delta_rule(
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
    """Read and write a linear memory along a sequence, one chunk at a time.

    Follows `S_t = S_{t-1} (alpha_t I - eta_t k_t k_t^T) + Z_t`, `Z_t = mu_t Z_{t-1} + eta_t u_t k_t^T` (Nested
    Learning, arXiv 2512.24695, Eq. 93 with momentum). Equal to `delta_rule_naive` up to rounding, for any `T >= 0`.

    Args:
        k: Keys `[B, T, H, D]`; unit length keeps the erase bounded.
        u: Write values, minus the inner loss's gradient with respect to the memory's output. `[B, T, H, Do]`.
        eta: Inner learning rate `[B, T, H]`.
        alpha: Retention in `[0, 1]`, `[B, T, H]`.
        state: Memory before the first token `[B, H, Do, D]`, float32 (float64 in tests). Its type is computed in.
        q: Queries like `k`; None if nothing is read.
        mu: Inner momentum in `[0, 1]`, `[B, T, H]`; None for none.
        momentum: `Z` before the first token, like `state`; None is zero. Only with `mu`.
        erase: Whether a write first erases `eta_t k_t k_t^T`; False is plain gradient descent.
        read: State that token t reads: `prefix` is `S_{t-1}`, `inclusive` is `S_t`, `boundary` is the state at the
            start of the token's chunk.
        chunk_size: Tokens per chunk; the last may be shorter. Changes only speed, except for `boundary`.

    Raises:
        ValueError: If shapes disagree, `read` is unknown, `chunk_size < 1`, or `momentum` comes without `mu`.
    """
    check_arguments(k, u, eta, alpha, state, q, mu, momentum, read, chunk_size)
    kind, tokens = state.dtype, k.shape[1]
    out_type = (q if q is not None else k).dtype
    if mu is not None and momentum is None:
        momentum = torch.zeros_like(state)

    def heads_first(x: Tensor) -> Tensor:
        return x.to(kind).transpose(1, 2)  # [B, H, T, ...]

    u = heads_first(u)
    parts = [repeat(None) if x is None else heads_first(x).split(chunk_size, dim=2) for x in (k, q, eta, alpha, mu)]
    outputs = []
    for values, keys, queries, *gates in zip(u.split(chunk_size, dim=2) if tokens else (), *parts, strict=False):
        tables = chunk_tables(*gates)
        held = predict(tables, keys, values, state, momentum) if erase else None
        if q is not None and read == "boundary":
            outputs.append(queries @ state.mT)
        elif q is not None:
            outputs.append(read_chunk(tables, keys, queries, values, held, state, momentum, read))
        state, momentum = write_chunk(tables, keys, values, held, state, momentum)

    output = None
    if q is not None:
        output = torch.cat(outputs, dim=2) if outputs else torch.zeros_like(u)
        output = output.transpose(1, 2).to(out_type)  # [B, T, H, Do]
    return DeltaRuleOutput(output, state, momentum)
