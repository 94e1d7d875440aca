"""A memory's matrix during a chunk: all tokens of the chunk read and write at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """Weights of the parts of a state after each token of a chunk: `[B, H, C]`, and `[B, H, C, C]` by writing token."""

    start: Tensor
    push: Tensor | None
    write: Tensor
    erase: Tensor
    last_push: Tensor | None
    momentum_decay: Tensor | None

    def before(self) -> Tables:
        """Return the same for the state before each token's own write."""

        def down(table: Tensor, first: float, dim: int) -> Tensor:
            head = torch.full_like(table.narrow(dim, 0, 1), first)
            return torch.cat([head, table.narrow(dim, 0, table.shape[dim] - 1)], dim=dim)

        push = None if self.push is None else down(self.push, 0.0, -1)
        parts = {"write": down(self.write, 0.0, -2), "erase": down(self.erase, 0.0, -2)}
        return self._replace(start=down(self.start, 1.0, -1), push=push, **parts)

    def of_several(self) -> Tables:
        """Return the same with a dimension for memories behind the heads."""
        return Tables(*(None if table is None else table.unsqueeze(2) for table in self))


def _log(gate: Tensor) -> Tensor:
    return gate.clamp_min(torch.finfo(gate.dtype).tiny).log()


def _ratios(log_gate: Tensor) -> Tensor:
    """Return at `(t, s)` the product of a gate from `s + 1` to `t`; 0 above the diagonal."""
    size = log_gate.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_gate.device).tril()
    steps = log_gate[..., None].expand(*log_gate.shape, size).masked_fill(~lower.tril(-1), 0.0)
    return steps.cumsum(-2).exp().masked_fill(~lower, 0.0)


def make_tables(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> Tables:
    """Return the tables of a chunk's gates `[B, H, C]`."""
    kept, start = _ratios(_log(alpha)), _log(alpha).cumsum(-1).exp()
    erase = kept * eta[..., None, :]
    if mu is None:
        return Tables(start, None, erase, erase, None, None)
    chain, from_start = _ratios(_log(mu)) * eta[..., None, :], _log(mu).cumsum(-1).exp()
    push = (kept @ from_start[..., None])[..., 0]
    return Tables(start, push, kept @ chain, erase, chain[..., -1, :], from_start[..., -1])


class Layer(NamedTuple):
    """One matrix of memories during one chunk: `S_t = alpha_t S_{t-1} - eta_t S_{t-1} k_t k_t^T + Z_t`.

    Attributes:
        tables: Tables of the chunk's gates.
        keys: `[B, H, C, D]`; there may be a dimension for memories behind the heads, here and below.
        values: Values that each token writes, `[B, H, C, Do]`.
        state: `S` before the chunk, `[B, H, Do, D]`.
        momentum: `Z` before the chunk; None without momentum.
        held: Answers to each token's key before its write, `[B, H, C, Do]`; None if writes do not erase these.
    """

    tables: Tables
    keys: Tensor
    values: Tensor
    state: Tensor
    momentum: Tensor | None
    held: Tensor | None = None

    def erasing(self) -> Layer:
        """Return the layer with writes that first erase what their keys held."""
        before = self.tables.before()
        right, system = self.read(before, self.keys), before.erase * (self.keys @ self.keys.mT)
        held = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        return self._replace(held=held)

    def first(self, size: int) -> Layer:
        """Return the first `size` numbers of values alone, of memories whose values stand side by side."""
        momentum = None if self.momentum is None else self.momentum[..., :size, :]
        held = None if self.held is None else self.held[..., :size]
        return Layer(self.tables, self.keys, self.values[..., :size], self.state[..., :size, :], momentum, held)

    def of_first(self, tables: Tables) -> Layer:
        """Return the first memory alone, of memories with keys of their own."""
        return Layer(tables, *(None if tensor is None else tensor[:, :, 0] for tensor in self[1:]))

    def read(self, tables: Tables, q: Tensor) -> Tensor:
        """Read the state that `tables` describe, with one query per token."""
        similar = q @ self.keys.mT
        output = tables.start[..., None] * (q @ self.state.mT) + (tables.write * similar) @ self.values
        if self.momentum is not None:
            output = output + tables.push[..., None] * (q @ self.momentum.mT)
        return output if self.held is None else output - (tables.erase * similar) @ self.held

    def after(self) -> tuple[Tensor, Tensor | None]:
        """Return state and momentum after the chunk."""
        last = self.tables
        values = last.write[..., -1, :, None] * self.values
        if self.held is not None:
            values = values - last.erase[..., -1, :, None] * self.held
        state = last.start[..., -1, None, None] * self.state + values.mT @ self.keys
        if self.momentum is None:
            return state, None
        pushes = (last.last_push[..., None] * self.values).mT @ self.keys
        state = state + last.push[..., -1, None, None] * self.momentum
        return state, last.momentum_decay[..., None, None] * self.momentum + pushes
