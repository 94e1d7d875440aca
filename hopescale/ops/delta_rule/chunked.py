"""The closed form of a chunk: matrix products and one triangular solve. README.md derives it.

The parts (`chunk_tables`, `predict`, `read_chunk`, `write_chunk`) work on `[..., C, .]` with heads before tokens and
broadcast over leading dimensions, so that memories which share keys and gates share the tables and the solve.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read, check_arguments


class ChunkTables(NamedTuple):
    """Weights of one chunk, in the type of the state. Rows are reading tokens, columns writing tokens.

    Attributes:
        eta: Inner learning rates `[..., C]`.
        decay: Retention between a write and a token, `a_t / a_s` for `s <= t`, else 0. `[..., C, C]`.
        carry: Weight of the chunk's first state in `S_t`, `a_t`. `[..., C]`.
        write: Weight of write `s` in `S_t`; equals `decay` without momentum. `[..., C, C]`.
        drive: Weight of the chunk's first momentum in `S_t`. `[..., C]`; None without momentum.
        last_momentum: Weight of write `s` in the last momentum. `[..., C]`; None without momentum.
        momentum_carry: Weight of the first momentum in the last one. `[...]`; None without momentum.
    """

    eta: Tensor
    decay: Tensor
    carry: Tensor
    write: Tensor
    drive: Tensor | None
    last_momentum: Tensor | None
    momentum_carry: Tensor | None

    def unsqueeze(self, dim: int) -> ChunkTables:
        """Insert a dimension (counted from the front) to broadcast over memories that share the gates."""
        return ChunkTables(*(None if table is None else table.unsqueeze(dim) for table in self))


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


def chunk_tables(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> ChunkTables:
    """Compute the decay tables of one chunk from its gates, each `[..., C]` with values in `[0, 1]` (`eta`: any)."""
    log_alpha = _log(alpha)
    decay, carry = _ratios(log_alpha), log_alpha.cumsum(-1).exp()
    if mu is None:
        return ChunkTables(eta, decay, carry, decay, None, None, None)
    log_mu = _log(mu)
    chain, momentum_carry = _ratios(log_mu), log_mu.cumsum(-1).exp()
    drive = (decay @ momentum_carry[..., None])[..., 0]
    return ChunkTables(eta, decay, carry, decay @ chain, drive, chain[..., -1, :], momentum_carry[..., -1])


def _before(table: Tensor, first: float = 0.0) -> Tensor:
    """Shift the rows down by one, so that row t describes the state before token t's own write."""
    if table.shape[-1] != table.shape[-2]:
        raise ValueError(f"expected a square table, got {tuple(table.shape)}")
    return torch.cat([torch.full_like(table[..., :1, :], first), table[..., :-1, :]], dim=-2)


def _before_column(column: Tensor, first: float) -> Tensor:
    return torch.cat([torch.full_like(column[..., :1], first), column[..., :-1]], dim=-1)


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
    similar = k @ k.mT  # [..., C, C]
    erase = _before(tables.decay) * similar
    right = _before_column(tables.carry, 1.0)[..., None] * (k @ state.mT)
    right = right + (_before(tables.write) * similar * tables.eta[..., None, :]) @ u
    if momentum is not None:
        right = right + _before_column(tables.drive, 0.0)[..., None] * (k @ momentum.mT)
    unit_lower = erase * tables.eta[..., None, :] + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    return torch.linalg.solve_triangular(unit_lower, right, upper=False, unitriangular=True)


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
    prefix = read == "prefix"
    carry = _before_column(tables.carry, 1.0) if prefix else tables.carry
    write = _before(tables.write) if prefix else tables.write
    similar = (q @ k.mT) * tables.eta[..., None, :]
    output = carry[..., None] * (q @ state.mT) + (write * similar) @ u
    if held is not None:
        decay = _before(tables.decay) if prefix else tables.decay
        output = output - (decay * similar) @ held
    if momentum is not None:
        drive = _before_column(tables.drive, 0.0) if prefix else tables.drive
        output = output + drive[..., None] * (q @ momentum.mT)
    return output


def write_chunk(
    tables: ChunkTables, k: Tensor, u: Tensor, held: Tensor | None, state: Tensor, momentum: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return memory and momentum after the chunk's last token. Shapes as in `predict` and `read_chunk`."""
    values = (tables.write[..., -1, :] * tables.eta)[..., None] * u  # [..., C, Do]
    if held is not None:
        values = values - (tables.decay[..., -1, :] * tables.eta)[..., None] * held
    after = tables.carry[..., -1, None, None] * state + values.mT @ k
    if momentum is None:
        return after, None
    after = after + tables.drive[..., -1, None, None] * momentum
    pushes = (tables.last_momentum * tables.eta)[..., None] * u
    return after, tables.momentum_carry[..., None, None] * momentum + pushes.mT @ k


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

    def heads_first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(kind).transpose(1, 2)  # [B, H, T, ...]

    k, u, q, eta, alpha, mu = map(heads_first, (k, u, q, eta, alpha, mu))
    outputs = []
    for start in range(0, tokens, chunk_size):
        part = slice(start, start + chunk_size)
        keys, values = k[:, :, part], u[:, :, part]
        tables = chunk_tables(eta[:, :, part], alpha[:, :, part], None if mu is None else mu[:, :, part])
        held = predict(tables, keys, values, state, momentum) if erase else None
        if q is not None and read == "boundary":
            outputs.append(q[:, :, part] @ state.mT)
        elif q is not None:
            outputs.append(read_chunk(tables, keys, q[:, :, part], values, held, state, momentum, read))
        state, momentum = write_chunk(tables, keys, values, held, state, momentum)

    output = None
    if q is not None:
        output = torch.cat(outputs, dim=2) if outputs else torch.zeros_like(u)
        output = output.transpose(1, 2).to(out_type)  # [B, T, H, Do]
    return DeltaRuleOutput(output, state, momentum)
