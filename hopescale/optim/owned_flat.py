"""Flat tensors whose pieces have owners among the replicas: summed and handed out in equal parts.

What an owner holds may be much or nothing, so parts of owners cannot be those of an exchange: filled up to the largest,
they would grow with the number of replicas. Equal parts do not; between a part and its owners lies an all-to-all
(`OwnerExchanges`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.cost.updates import EVEN_UNIT, Wire
from hopescale.optim.wire import SentSum
from hopescale.parallel.node_flat import NodeFlat
from hopescale.parallel.tiers import Tiers


class OwnedFlat:
    """Pieces of all owners in one tensor, owner by owner, filled up to equal parts for the replicas.

    With nodes, sums that wait for a later step are held in shares of the replicas of a node (`Tiers`), and `flat` can
    be free in between.

    Args:
        sizes: Entries of each owner's pieces.
        like: Tensor whose type and device it has.
        tiers: Replicas, which are the owners.
        waits: Whether it takes sums that wait, where there are nodes.
        sleeps: Whether its memory is free from `rest` until `wake`, where there are nodes; it is zeros then.

    Attributes:
        flat: All pieces, zeros at first.
        part: Entries of an equal part.
        own: Pieces of this replica, a view.
        shared: Share that is kept of it, once it is shared out inside nodes; None before.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        like: Tensor,
        tiers: Tiers,
        *,
        waits: bool = False,
        sleeps: bool = False,
    ):
        self._tiers, self._group = tiers, tiers.group
        self._rank, owners = self._group.rank(), self._group.size()
        ends = [0, *accumulate(sum(of_owner) for of_owner in sizes)]
        self._ranges = [range(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
        self._total, self.part = ends[-1], -(-ends[-1] // (EVEN_UNIT * owners)) * EVEN_UNIT
        self.flat = torch.zeros(self.part * owners, dtype=like.dtype, device=like.device)
        mine = self._ranges[self._rank]
        self.own = self.flat[mine.start : mine.stop]
        self._held = None
        if waits and tiers.has_nodes:
            self._held = torch.zeros_like(tiers.share(self.flat))
        self._sleeps, self._bytes = sleeps and tiers.has_nodes, self.flat.untyped_storage().nbytes()
        self._work: dist.Work | None = None
        self._sent: SentSum | None = None
        self._kept: Tensor | None = None
        self._fetches = False
        self.shared: NodeFlat | None = None

    def share_out(self) -> None:
        """Let it be whole only while it is used from here on; what it holds of this replica's share is kept."""
        self.shared = NodeFlat(self.flat, self._tiers)
        self.shared.free()

    def pieces(self, sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """Return the pieces of every owner, which the constructor was given the sizes of."""
        return [
            list(self.flat[each.start : each.stop].split(list(of_owner))) if of_owner else []
            for each, of_owner in zip(self._ranges, sizes, strict=True)
        ]

    def begin_sum(self) -> None:
        """Begin to sum over replicas; when sums `arrive`, each replica has its part of them."""
        if self._group.size() > 1:
            self.wake()
            self._work = self._tiers.begin_sum(self.flat, self._held)

    def send(self, wire: Wire) -> None:
        """Take the sums out, but for what the wire rounds away, and begin to add them up over replicas."""
        self._sent = SentSum(self.flat, self._group, wire)

    def fetch(self) -> None:
        """Let `arrive` put what was sent in the place of the sums, as `begin_sum` does, until `put_back`."""
        self._fetches = self._sent is not None

    def put_back(self) -> None:
        """Put the sums that are gathered back in place of those that `arrive` has fetched."""
        if self._kept is not None:
            self.flat.copy_(self._kept)
            self._kept = None

    def kept_squares(self) -> Tensor | None:
        """Return the squared norm of the sums that are out of place; None if none are."""
        return None if self._kept is None else self._kept.square().sum()

    def total_sent(self) -> Tensor | None:
        """Return what adds up over replicas to the total that is on its way; None if none is. All replicas call."""
        return None if self._sent is None else self._sent.share()

    def send_again(self, parts: Tensor | None) -> None:
        """Put parts that add up over replicas, or nothing, in the place of what is on its way. All replicas call."""
        self.drop_sent()
        if parts is not None:
            self._sent = SentSum(parts, self._group)

    def drop_sent(self) -> None:
        """Drop what is on its way, after it has arrived."""
        if self._sent is not None:
            self._sent.share()
        self._sent, self._kept, self._fetches = None, None, False

    def like(self, view: Tensor, flat: Tensor) -> Tensor:
        """Return the view of another flat tensor that lies as `view` does in this one."""
        return flat.as_strided(view.shape, view.stride(), view.storage_offset() - self.flat.storage_offset())

    @property
    def holds(self) -> bool:
        """Whether `hold` leaves what waits for a later step in shares of the replicas of a node."""
        return self._held is not None

    @property
    def is_asleep(self) -> bool:
        """Whether `flat` has no memory, and stands for zeros."""
        return self._sleeps and self.flat.untyped_storage().nbytes() == 0

    def wake(self) -> None:
        """Make `flat` zeros if its memory is free."""
        if self.is_asleep:
            self.flat.untyped_storage().resize_(self._bytes)
            self.flat.zero_()

    def rest(self) -> None:
        """Make `flat` zeros, and free its memory if it sleeps; views of it stay."""
        if self._sleeps:
            self.flat.untyped_storage().resize_(0)
        else:
            self.flat.zero_()

    def hold(self) -> None:
        """Sum what waits for a later step inside the node, if there are nodes."""
        if self._held is not None:
            self.wake()
            self._tiers.hold(self.flat, self._held)
            self.rest()

    def gathered(self) -> list[Tensor]:
        """Return what adds up, here and in what is held, to be changed in place."""
        return [sums for sums in (None if self.is_asleep else self.flat, self._held) if sums is not None]

    def discard(self) -> None:
        """Drop all that adds up, here and in what is held."""
        self.rest()
        self.drop_held()

    def drop_held(self) -> None:
        """Begin a new period of what waits."""
        if self._held is not None:
            self._held.zero_()

    def share_of(self, piece: Tensor) -> range:
        """Return which entries of a flattened piece of `flat` are in the share of it that this replica keeps."""
        begin = piece.storage_offset()
        return self._tiers.share_of_span(self.flat.numel(), range(begin, begin + piece.numel()))

    def held_part(self, piece: Tensor) -> tuple[int, Tensor]:
        """Return what this replica holds of a piece of `flat`, and where it begins in the flattened piece."""
        here = self.share_of(piece)
        first = piece.storage_offset() + here.start - self._tiers.share_range(self.flat.numel()).start
        return here.start, self._held[first : first + len(here)]

    def held_sum(self, piece: Tensor) -> Tensor:
        """Return the sum so far of a piece, with zeros where other replicas of the node hold it."""
        whole = torch.zeros_like(piece) if self.is_asleep else piece.clone()
        start, part = self.held_part(piece)
        whole.view(-1)[start : start + part.numel()] += part
        return whole

    def entries_of(self, part: int, span: range) -> range:
        """Return some entries of a part, as those of the flat tensor, without what is there to fill it up."""
        first = part * self.part
        return range(min(first + span.start, self._total), min(first + span.stop, self._total))

    def owned_by(self, replica: int) -> range:
        """Return the entries that belong to an owner."""
        return self._ranges[replica]

    def clear_others(self) -> None:
        """Set what belongs to other owners to zero."""
        mine = self._ranges[self._rank]
        self.flat[: mine.start].zero_()
        self.flat[mine.stop :].zero_()

    def take(self, kept: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take over pieces of this replica that lie beside, each with its place, before they are handed out."""
        if self.shared is not None:
            self.shared.make_room()
        for piece, tensor in kept:
            piece.copy_(tensor)

    def begin_to_gather(self) -> None:
        """Begin to hand parts to all replicas, or to the shares of all nodes, complete after `finish`."""
        if self._group.size() > 1:
            self._work = self._tiers.begin_to_gather(self.flat) if self.shared is None else self._begin_to_share()

    def _begin_to_share(self) -> dist.Work:
        self.shared.own.copy_(self._tiers.own(self.flat))
        self.shared.free()
        return self.shared.begin_to_hand_out()

    def finish(self) -> None:
        """Wait for what has begun."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def arrive(self) -> bool:
        """Wait for sums; tell whether any have come, and each replica has its part of them."""
        if self._fetches:
            self._fetches = False
            self._kept = self.flat.clone()
            self._tiers.own(self.flat).copy_(self._sent.finish())
            self._sent = None
            return True
        has_begun = self._work is not None
        self.finish()
        return has_begun
