"""Hands tensors on along a sequence whose pieces lie on several ranks, and their gradients back.

Piece `p` of a sequence lies on rank `p mod cp` of the `cp` ranks that share it, so that these form a ring: each gets
from the rank before it what the piece before has left, and passes on what its own leaves.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.parallel.mesh import Mesh


class Like(NamedTuple):
    """Shape and type of a tensor that is handed on; both sides know them beforehand."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)


class Relay:
    """One rank's part of the ring.

    All ranks call the same methods in the same order, forward and backward, each for its own piece.

    Args:
        mesh: Ranks of the run, and this process among them.
        segments: Pieces of a sequence on each rank. With one, the last rank sends nothing to the first, and a rank
            waits until at most two of its messages are on their way; with several it cannot, as ranks would wait for
            one another all around the ring.
    """

    IN_FLIGHT = 2
    """Messages on their way at most, where pieces make no ring."""

    def __init__(self, mesh: Mesh, segments: int):
        self.mesh, self.rank, self.size = mesh, mesh.cp_group.rank(), mesh.cp_group.size()
        self._most = self.IN_FLIGHT if segments == 1 else None
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(
        self, x: Tensor, fresh: Sequence[Tensor], tag: int, known: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `x`, and tensors from the rank before, which in the backward pass get their gradients from here.

        Args:
            x: Tensor of this piece that is computed before these are used.
            fresh: Tensors in whose place these come, of the same shapes and types. Their gradients are zeros, so that
                every parameter has a gradient on every rank.
            tag: Number of the message among those of the piece, not negative.
            known: Tensors that came before, where activations are computed again: nothing is received.
        """
        x, *tensors = _Receive.apply(self, tag, known, x, *fresh)
        return x, tensors

    def send(self, x: Tensor, tensors: Sequence[Tensor], tag: int, *, again: bool = False) -> Tensor:
        """Send tensors to the rank behind; returns `x`, whose gradient is computed after theirs have come back.

        Nothing is sent `again`, where activations are computed again.
        """
        return _Send.apply(self, tag, again, x, *tensors)

    def settle(self) -> None:
        """Wait until all that this rank has sent is received. Called by all ranks, after the same passes."""
        while self._sent:
            self._sent.popleft()[0].wait()

    def give(self, tensors: Sequence[Tensor], step: int, tag: int) -> None:
        """Begin to send tensors to the rank behind (`step` 1), or to the rank before (-1)."""
        flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors])
        peer = (self.rank + step) % self.size
        work = dist.isend(flat, self._number(peer), group=self._group(self.rank, peer), tag=tag)
        self._sent.append((work, flat))
        while self._most is not None and len(self._sent) > self._most:
            self._sent.popleft()[0].wait()

    def take(self, like: Sequence[Like], device: torch.device, step: int, tag: int) -> list[Tensor]:
        """Wait for tensors that take `step` ranks to come here: 1 from the rank before, -1 from the rank behind."""
        sizes = [math.prod(each.shape) * each.dtype.itemsize for each in like]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        peer = (self.rank - step) % self.size
        dist.irecv(flat, self._number(peer), group=self._group(peer, self.rank), tag=tag).wait()
        # Each part in memory of its own: within `flat` a tensor need not begin where its type may.
        return [
            part.clone().view(each.dtype).view(each.shape) for part, each in zip(flat.split(sizes), like, strict=True)
        ]

    def _number(self, peer: int) -> int:
        """Return the number of a rank of the ring among all ranks of the run."""
        return dist.get_global_rank(self.mesh.cp_group, peer)

    def _group(self, source: int, target: int) -> dist.ProcessGroup:
        """Return the group for messages in a direction.

        NCCL keeps all messages of a group between two ranks in one order, whoever sends them.
        """
        return self.mesh.cp_group if source < target else self.mesh.cp_back_group


class _Receive(torch.autograd.Function):
    """The identity of a tensor; in place of others come those of the rank before, or those that came already."""

    @staticmethod
    def forward(
        ctx: Any, relay: Relay, tag: int, known: Sequence[Tensor] | None, x: Tensor, *fresh: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.relay, ctx.tag = relay, tag
        if known is None:
            return x.view_as(x), *relay.take([Like.of(tensor) for tensor in fresh], x.device, 1, tag)
        return x.view_as(x), *(tensor.detach() for tensor in known)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, *d_tensors: Tensor) -> tuple[Tensor | None, ...]:
        ctx.relay.give(d_tensors, -1, ctx.tag)
        needed = zip(ctx.needs_input_grad[4:], d_tensors, strict=True)
        return None, None, None, d_x, *(torch.zeros_like(each) if needs else None for needs, each in needed)


class _Send(torch.autograd.Function):
    """The identity of a tensor; sends others to the rank behind, which sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, relay: Relay, tag: int, again: bool, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.relay, ctx.tag, ctx.like = relay, tag, [Like.of(tensor) for tensor in tensors]
        if not again:
            relay.give(tensors, 1, tag)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, d_x, *ctx.relay.take(ctx.like, d_x.device, -1, ctx.tag)
