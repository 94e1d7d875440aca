"""Weights of the parts of a state at each token of a chunk, by the gates alone. README.md derives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DecayWeights(NamedTuple):
    """Weights of one chunk, in the type of the state. Rows are reading tokens, columns writing tokens.

    Row `t` is of the state before token `t`, the last of the end; `before` and `after` have `C` of the `C + 1` rows.

    Attributes:
        start: Weight of the chunk's first state `[..., C + 1]`.
        push: Weight of the chunk's first momentum, the same; None without momentum.
        write: Weight of each write value, its `eta` included `[..., C + 1, C]`; equals `erase` without momentum.
        erase: Weight of each write's erase, the same.
        last_push: Weight of each write value in the last momentum, its `eta` included `[..., C]`; None without.
        momentum_decay: Weight of the first momentum in the last one `[...]`; None without.
    """

    start: Tensor
    push: Tensor | None
    write: Tensor
    erase: Tensor
    last_push: Tensor | None
    momentum_decay: Tensor | None

    @property
    def before(self) -> DecayWeights:
        """Weights of the state before each token's own write, `S_{t-1}`."""
        return self._rows(slice(-1))

    @property
    def after(self) -> DecayWeights:
        """Weights of the state after it, `S_t`."""
        return self._rows(slice(1, None))

    def _rows(self, rows: slice) -> DecayWeights:
        start, push, write, erase, *last = self
        push = None if push is None else push[..., rows]
        return DecayWeights(start[..., rows], push, write[..., rows, :], erase[..., rows, :], *last)

    def map(self, function: Callable[[Tensor], Tensor]) -> DecayWeights:
        """Apply a function to every table."""
        return DecayWeights(*(None if table is None else function(table) for table in self))


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


def products_to_tokens(log_gate: Tensor) -> Tensor:
    """Return at `(t, s)` the product of a gate from token `s + 1` to `t`, from its logs `[..., C]`: `[..., C, C]`.

    It is 1 on the diagonal and 0 above. A log of `-inf` is a gate of 0.
    """
    return _Ratios.apply(log_gate)[..., 1:, :]


def decay_weights(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> DecayWeights:
    """Compute the tables of one chunk from its gates, each `[..., C]`; `alpha` and `mu` in `[0, 1]`."""
    log_alpha = _log(alpha)
    alpha_products = _Ratios.apply(log_alpha)
    start = F.pad(log_alpha.cumsum(-1), (1, 0)).exp()
    erase = alpha_products * eta[..., None, :]
    push = last_push = momentum_decay = None
    if mu is None:
        write = erase
    else:
        log_mu = _log(mu)
        chain = _Ratios.apply(log_mu)[..., 1:, :] * eta[..., None, :]
        from_start = log_mu.cumsum(-1).exp()
        write, push = alpha_products @ chain, (alpha_products @ from_start[..., None])[..., 0]
        last_push, momentum_decay = chain[..., -1, :], from_start[..., -1]
    return DecayWeights(start, push, write, erase, last_push, momentum_decay)
