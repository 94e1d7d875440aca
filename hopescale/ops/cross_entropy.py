"""Cross-entropy in pieces, whose gradient is made with the loss: no float32 copy of all logits lives at any time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.limits import LOGITS_AT_A_TIME


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        total, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
        rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
        for piece, wanted, given in zip(*(x.split(rows) for x in (logits, targets, gradient)), strict=True):
            logs = F.log_softmax(piece.float(), dim=-1)
            total += F.nll_loss(logs, wanted, ignore_index=ignored, reduction="sum")
            counted = (wanted != ignored)[:, None]
            slopes = logs.exp_()
            slopes.scatter_add_(
                1, wanted.where(counted[:, 0], 0)[:, None], slopes.new_full((), -1.0).expand_as(counted)
            )
            given.copy_(slopes.mul_(counted))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        result, rows = torch.empty_like(gradient), max(1, LOGITS_AT_A_TIME // gradient.shape[-1])
        for piece, given in zip(gradient.split(rows), result.split(rows), strict=True):
            given.copy_(piece.float() * d_total)  # a factor in bfloat16 would scale the whole step
        return result, None, None


def cross_entropy_in_pieces(logits: Tensor, targets: Tensor, *, ignored: int) -> Tensor:
    """Sum the cross-entropy in nats over all targets that are not `ignored`, in float32.

    Args:
        logits: Logits `[N, V]`; their gradient has their type.
        targets: Indices `[N]`, int64.
        ignored: Target that does not count.
    """
    return _CrossEntropy.apply(logits, targets, ignored)
