"""A flat tensor of weights that is whole only while it is used: replicas of a node keep a share of it each."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hopescale.parallel.tiers import Tiers


class NodeFlat:
    """Weights of which a replica keeps the node's share, and its own part within that.

    The memory of the flat tensor is free while it is not whole; views of it stay, and are whole when it is.

    Args:
        flat: Weights `[replicas * k]`, of which the entries of this replica's share are set.
        tiers: Replicas, with nodes.

    Attributes:
        share: Entries that are kept, `[nodes * k]`.
        own: Part of this replica, a view of it.
    """

    def __init__(self, flat: Tensor, tiers: Tiers):
        self.flat, self._tiers = flat, tiers
        self.share = tiers.share(flat).clone()
        self.own = tiers.own_of_share(self.share)
        self._bytes = flat.untyped_storage().nbytes()
        self._work: dist.Work | None = None

    @property
    def has_memory(self) -> bool:
        """Whether the flat tensor has memory: it is whole, or on its way to be, or used for something else."""
        return self.flat.untyped_storage().nbytes() > 0

    def make_room(self) -> None:
        """Give the flat tensor its memory, whatever is in it."""
        self.flat.untyped_storage().resize_(self._bytes)

    def free(self) -> None:
        """Free the flat tensor's memory."""
        self.wait()
        self.flat.untyped_storage().resize_(0)

    def begin_to_gather(self) -> None:
        """Begin to make the flat tensor whole, from the shares of the node, unless it is."""
        if not self.has_memory:
            self.make_room()
            self._work = self._tiers.begin_to_gather_shares(self.flat, self.share)

    def wait(self) -> None:
        """Wait until the flat tensor is whole, if that has begun."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def begin_to_hand_out(self) -> dist.Work:
        """Begin to hand out every replica's own part to the shares of all nodes."""
        return self._tiers.begin_to_gather_parts(self.share)
