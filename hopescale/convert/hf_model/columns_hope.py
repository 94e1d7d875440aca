"""What mixers share: the columns of a call and the rows' positions, rows that run together, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


class RowPosition:
    """Tokens of each row before a place in a text, known on the host: no layer waits for its device to learn them."""

    def __init__(self, counts: Sequence[int]):
        self.counts = counts
        self._begins: dict[tuple[int, torch.device], Tensor | bool] = {}
        self._tensors: dict[torch.device, Tensor] = {}

    def __add__(self, tokens: int) -> RowPosition:
        return RowPosition([count + tokens for count in self.counts]) if tokens else self

    def of(self, rows: Tensor) -> RowPosition:
        """Return the position of some of the rows."""
        return RowPosition([self.counts[row] for row in rows.tolist()])

    def tensor(self, device: torch.device) -> Tensor:
        """Return it as a tensor `[B]`."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.counts, dtype=torch.long, device=device)
        return self._tensors[device]

    def begins(self, period: int, device: torch.device) -> Tensor | bool:
        """Say whether a piece of so many tokens begins here: in all rows, in none, or in which of them `[B]`."""
        if (period, device) not in self._begins:
            rows = [count % period == 0 for count in self.counts]
            some = any(rows) and not all(rows)
            self._begins[period, device] = torch.tensor(rows, device=device) if some else any(rows)
        return self._begins[period, device]


def choose(begins: Tensor | bool, new: Tensor, old: Tensor) -> Tensor:
    """Take over `new` in the rows where something begins."""
    if isinstance(begins, bool):
        return new if begins else old
    return torch.where(begins.view(-1, *[1] * (new.dim() - 1)), new, old)


class Columns(NamedTuple):
    """The columns of one call.

    Attributes:
        real: `[B, past + T]`, tokens among all columns.
        position: Tokens of each row before this call.
        groups: Rows that run through a recurrence together, on the host, and the columns of this call that are their
            tokens.
        padded: Whether any column, of this call or before, is padding.
    """

    real: Tensor
    position: RowPosition
    groups: list[tuple[Tensor, slice]]
    padded: bool = True


Mix = Callable[[Tensor, State, RowPosition], tuple[Tensor, State]]


class Norm(nn.Module):
    """RMSNorm over the last dimension, in float32, times a constant."""

    def __init__(self, *shape: int, eps: float, multiplier: float = 1.0):
        super().__init__()
        self.weight, self.eps, self.multiplier = nn.Parameter(torch.ones(shape)), eps, multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`; returns the type of `x`."""
        weight, wide = self.weight if self.multiplier == 1 else self.weight * self.multiplier, x.float()
        if weight.dim() == 1 and weight.dtype == wide.dtype:
            return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)
        return (F.rms_norm(wide, x.shape[-1:], None, self.eps) * weight).to(x.dtype)


def mix_groups(run: Mix, x: Tensor, state: State, columns: Columns, width: int | None = None) -> tuple[Tensor, State]:
    """Run a recurrence over the tokens of each group of rows: `run(x, state, position)` knows of no padding.

    Padding in `x` `[B, T, N]` gives zeros, and moves no state. Answers are `[B, T, width]`; None is the width of `x`.
    """
    if len(columns.groups) == 1 and columns.groups[0][0].numel() == x.shape[0]:
        span, tokens = columns.groups[0][1], x.shape[1]
        if span == slice(0, tokens):
            return run(x, state, columns.position)
        y, state = run(x[:, span], state, columns.position)
        return F.pad(y, (0, 0, span.start, tokens - span.stop)), state
    mixed, state = None, {name: tensor.clone() for name, tensor in state.items()}
    shape = (*x.shape[:2], width or x.shape[2])
    for rows, span in columns.groups:
        part = {name: tensor[rows] for name, tensor in state.items()}
        y, part = run(x[rows, span], part, columns.position.of(rows))
        mixed = y.new_zeros(shape) if mixed is None else mixed  # autocast decides the dtype of `y`
        mixed[rows, span] = y
        for name, tensor in part.items():
            state[name][rows] = tensor.to(state[name].dtype)
    return x.new_zeros(shape) if mixed is None else mixed, state


def as_written(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which autocast does not lower the precision of results of `x`, as memories need it."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def to_unit(x: Tensor) -> Tensor:
    """Scale vectors to unit length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
