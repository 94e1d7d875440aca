"""Buckets in which gradients and weights of matrices travel between replicas: one exchange for many tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

AT_ONCE = 2
"""Exchanges that may be under way together; each holds its buffers until it is finished."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel in one exchange.

    Attributes:
        parts: Names of the parameters of every owner.
        room: Entries of the largest of these parts.
        last: Index of the last shape class in the bucket.
    """

    parts: list[list[str]]
    room: int
    last: int


def take_sums(_: Tensor, own: Tensor, gradients: Sequence[Tensor]) -> None:
    """Copy the result of a reduce-scatter to the gradients; the first argument keeps its input alive until then."""
    _copy(gradients, unpacked(own, gradients))


def take_weights(_: Tensor, flat: Tensor, weights: Sequence[Sequence[Tensor]]) -> None:
    """Copy the result of an all-gather to the weights of each owner; the first argument keeps its input alive."""
    for tensors, packed in zip(weights, flat, strict=True):
        _copy(tensors, unpacked(packed, tensors))


def pack(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write tensors end to end to the beginning of `flat`."""
    _copy(unpacked(flat, tensors), tensors)


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, tensors)


def unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors at the beginning of `flat`, in the shapes of `like`."""
    sizes = [tensor.numel() for tensor in like]
    parts = flat[: sum(sizes)].split(sizes) if sizes else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class InFlight:
    """Exchanges that have begun, finished in the order in which they began. All ranks begin them in the same order."""

    def __init__(self) -> None:
        self._begun: deque[tuple[dist.Work, Callable[[], None]]] = deque()

    def add(self, work: dist.Work, finish: Callable[[], None]) -> None:
        """Take an exchange that `async_op=True` began, after waiting for the earliest if there are too many.

        `finish` is called when it is complete, and keeps its buffers until then.
        """
        self._begun.append((work, finish))
        if len(self._begun) > AT_ONCE:
            self._finish_one()

    def wait(self) -> None:
        """Finish all."""
        while self._begun:
            self._finish_one()

    def _finish_one(self) -> None:
        work, finish = self._begun.popleft()
        work.wait()
        finish()
