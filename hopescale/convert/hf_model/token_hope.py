"""A single token's step of Hope's memories, in the fewest operations; generation runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Token(NamedTuple):
    """Gates `[B, H, 1]` of a single token, as `Tables` are for a chunk, and whether the state holds its write."""

    eta: Tensor
    alpha: Tensor
    mu: Tensor | None
    written: bool = True

    def before(self) -> Token:
        """Return the same for the state before the token's own write."""
        return self._replace(written=False)


class TokenLayer:
    """One matrix of a memory during one token, as `Layer` is for a chunk: the equation itself.

    Args:
        token: Gates.
        key: `[B, H, 1, D]`.
        value: Value that is written, `[B, H, 1, Do]`.
        state: `S` before the token, `[B, H, Do, D]`.
        momentum: `Z` before the token; None without momentum.
        erase: Whether a write erases what its key held.
    """

    def __init__(self, token: Token, key: Tensor, value: Tensor, state: Tensor, momentum: Tensor | None, erase: bool):
        step = token.eta[..., None] * key
        write, self.start, self.momentum = value.mT * step, state, None
        if momentum is not None:
            write = self.momentum = torch.addcmul(write, token.mu[..., None], momentum)
        self.state = torch.addcmul(write, token.alpha[..., None], state)
        if erase:
            self.state = torch.addcmul(self.state, (key @ state.mT).mT, step, value=-1)

    def read(self, token: Token, q: Tensor) -> Tensor:
        """Read the state before or after the write, with one query."""
        return q @ (self.state if token.written else self.start).mT

    def after(self) -> tuple[Tensor, Tensor | None]:
        """Return state and momentum after the token."""
        return self.state, self.momentum
