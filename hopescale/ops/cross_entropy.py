"""Cross-entropy in pieces, whose gradient is made with the loss: no float32 copy of all logits lives at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.limits import LOGITS_AT_A_TIME


@dataclass(frozen=True)
class VocabularyShare:
    """One rank's part of a vocabulary that ranks have split.

    Attributes:
        first: Entry of the vocabulary that the rank's first column belongs to.
        maximum: Function that replaces numbers by the largest that any rank has, in place.
        total: Function that replaces numbers by their sums over ranks, in place.
    """

    first: int
    maximum: Callable[[Tensor], object]
    total: Callable[[Tensor], object]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        total, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
        for piece, wanted, given in _pieces(logits, targets, gradient):
            logs = F.log_softmax(piece.float(), dim=-1)
            total += F.nll_loss(logs, wanted, ignore_index=ignored, reduction="sum")
            counted = (wanted != ignored)[:, None]
            slopes = logs.exp_()
            slopes.scatter_add_(
                1, wanted.where(counted[:, 0], 0)[:, None], slopes.new_full((), -1.0).expand_as(counted)
            )
            given.copy_(slopes.mul_(counted))
            del logs, slopes  # before the next piece comes
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, d_total), None, None


class _SharedCrossEntropy(torch.autograd.Function):
    """The same where ranks have split the vocabulary, with two exchanges of one and two numbers a target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int, share: VocabularyShare) -> Tensor:
        counted, own = targets != ignored, targets - share.first
        mine = counted & (own >= 0) & (own < logits.shape[-1])
        own = own.where(mine, 0)[:, None]
        largest = logits.amax(dim=-1, keepdim=True).float()
        share.maximum(largest)
        sums, wanted = torch.empty_like(largest), logits.gather(1, own).float() - largest
        for piece, most, given in _pieces(logits, largest, sums):
            torch.sum((piece.float() - most).exp_(), dim=-1, keepdim=True, out=given)
        both = torch.stack([sums, wanted.where(mine[:, None], 0.0)])
        share.total(both)
        sums, gradient = both[0], torch.empty_like(logits)
        for piece, most, sum_, place, is_mine, counts, given in _pieces(
            logits, largest, sums, own, mine[:, None], counted[:, None], gradient
        ):
            slopes = (piece.float() - most).exp_().div_(sum_)
            slopes.scatter_add_(1, place, -is_mine.float())
            given.copy_(slopes.mul_(counts))
            del slopes
        ctx.save_for_backward(gradient)
        return ((sums.log() - both[1]) * counted[:, None]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, d_total), None, None, None


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut logits, and what goes with their rows, into pieces of some logits each."""
    rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a gradient times a factor, which in bfloat16 would scale the whole step."""
    result = torch.empty_like(gradient)
    for piece, given in _pieces(gradient, result):
        given.copy_(piece.float() * factor)
    return result


def cross_entropy_in_pieces(
    logits: Tensor, targets: Tensor, *, ignored: int, share: VocabularyShare | None = None
) -> Tensor:
    """Sum the cross-entropy in nats over all targets that are not `ignored`, in float32.

    Args:
        logits: Logits `[N, V]`, or this rank's columns of them; their gradient has their type.
        targets: Indices `[N]` into the whole vocabulary, int64.
        ignored: Target that does not count.
        share: Part of the vocabulary that this rank has; None is all of it.
    """
    if share is None:
        return _CrossEntropy.apply(logits, targets, ignored)
    return _SharedCrossEntropy.apply(logits, targets, ignored, share)
