"""Replicas that sum and hand out flat tensors in equal parts: all at once, or inside their nodes and between these."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Tiers:
    """Replicas, each with an equal part of every flat tensor `[replicas * k]`.

    Without nodes part `r` is that of replica `r`, and a sum is one reduce-scatter. With nodes, a reduce-scatter inside
    each node leaves every replica with the parts of its place in the node, side by side: the *node's share* of it. A
    second one, over the replicas of that place in all nodes, leaves its own. The way back is an all-gather in each.
    What waits for a later step is summed inside the node alone, into a share that lasts, so that nothing crosses
    between nodes and no replica keeps a whole sum.

    Args:
        group: All replicas, those of a node side by side.
        node: Replicas of this node; None for no nodes.
        nodes: Replicas of this place in all nodes; None for no nodes.
    """

    def __init__(
        self, group: dist.ProcessGroup, node: dist.ProcessGroup | None = None, nodes: dist.ProcessGroup | None = None
    ):
        self.group, self._node, self._nodes = group, node, nodes
        self.has_nodes = node is not None and nodes is not None and nodes.size() > 1
        self.part = self.part_of(group.rank())

    def part_of(self, replica: int) -> int:
        """Return which part of a flat tensor is a replica's."""
        if not self.has_nodes:
            return replica
        node, place = divmod(replica, self._node.size())
        return place * self._nodes.size() + node

    def own(self, flat: Tensor) -> Tensor:
        """Return this replica's part, a view."""
        size = flat.numel() // self.group.size()
        return flat.narrow(0, self.part * size, size)

    def share_range(self, entries: int) -> range:
        """Return where the node's share of this replica lies in a flat tensor of so many entries."""
        size = entries // self._node.size()
        return range(self._node.rank() * size, (self._node.rank() + 1) * size)

    def share_of_span(self, entries: int, span: range) -> range:
        """Return which entries of a span of such a tensor lie in that share, counted from the span's start."""
        share = self.share_range(entries)
        start, stop = (min(max(place, span.start), span.stop) - span.start for place in (share.start, share.stop))
        return range(start, stop)

    def share(self, flat: Tensor) -> Tensor:
        """Return the node's share of this replica, a view."""
        where = self.share_range(flat.numel())
        return flat[where.start : where.stop]

    def begin_sum(self, flat: Tensor, held: Tensor | None) -> dist.Work:
        """Begin to sum over replicas in place, with what is held; when it is done, `own` alone has a meaning."""
        if not self.has_nodes:
            return dist.reduce_scatter_tensor(self.own(flat), flat, group=self.group, async_op=True)
        share = self.share(flat)
        dist.reduce_scatter_tensor(share, flat, group=self._node)
        if held is not None:
            share.add_(held)
        return dist.reduce_scatter_tensor(self.own(flat), share, group=self._nodes, async_op=True)

    def own_of_share(self, share: Tensor) -> Tensor:
        """Return this replica's part of a node's share of its own, a view."""
        return share.chunk(self._nodes.size())[self._nodes.rank()]

    def begin_sum_of_shares(self, share: Tensor) -> dist.Work:
        """Begin to sum what nodes hold, in place; when it is done, `own_of_share` alone has a meaning."""
        return dist.reduce_scatter_tensor(self.own_of_share(share), share, group=self._nodes, async_op=True)

    def hold(self, flat: Tensor, held: Tensor) -> None:
        """Add the sum over the node to what is held, the node's share of this replica; `flat` is used up."""
        share = self.share(flat)
        dist.reduce_scatter_tensor(share, flat, group=self._node)
        held.add_(share)

    def begin_to_gather(self, flat: Tensor) -> dist.Work:
        """Begin to hand out every replica's own part to all."""
        if not self.has_nodes:
            return dist.all_gather_into_tensor(flat, self.own(flat), group=self.group, async_op=True)
        share = self.share(flat)
        dist.all_gather_into_tensor(share, self.own(flat), group=self._nodes)
        return dist.all_gather_into_tensor(flat, share, group=self._node, async_op=True)

    def begin_to_gather_parts(self, share: Tensor) -> dist.Work:
        """Begin to fill the node's share of this replica from the parts in it of the replicas of its place."""
        return dist.all_gather_into_tensor(share, self.own_of_share(share), group=self._nodes, async_op=True)

    def begin_to_gather_shares(self, flat: Tensor, share: Tensor) -> dist.Work:
        """Begin to fill a flat tensor from what each replica of the node keeps of it."""
        return dist.all_gather_into_tensor(flat, share, group=self._node, async_op=True)
