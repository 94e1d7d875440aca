"""Process groups, of which a rank makes only those that it is in: their number does not grow with that of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from hopescale.config.layout import Layout
from hopescale.parallel.variables import variable_set

_GLOO_WAITS = "TORCH_GLOO_LAZY_INIT"
"""Variable that torch reads when a process makes its first group over gloo."""


def connected_when_used() -> AbstractContextManager[None]:
    """Let gloo connect two ranks when they first exchange something, not every two of them when a group is made.

    It holds for all groups of a process whose first one is made inside.
    """
    return variable_set(_GLOO_WAITS)


class OwnGroups:
    """Groups of this rank, one for each set of ranks. All ranks make them in the same order.

    Torch names a group by its members and by the number of groups that a process has, so every rank makes as many: one
    that is on neither end of the pipeline has a group of its own in the place of theirs.

    Args:
        layout: Degrees of the axes.

    Attributes:
        tp, cp, pp: Groups along the axes.
        dp: Ranks over which gradients are summed: replicas, and of each the ranks that share its sequences.
        cp_back: The ranks of `cp` once more.
        node: Ranks of `dp` on this rank's node; None if the layout has no nodes.
        nodes: Ranks of `dp` that have this rank's place on their nodes; None likewise.
        ends: First and last stage of this rank's pipeline; this rank alone in between, and without a pipeline.
    """

    def __init__(self, layout: Layout):
        self._rank, self._made = dist.get_rank(), {}
        tp, cp = layout.tp, layout.cp
        replica, stage = tp * cp, tp * cp * layout.dp
        stages = range(self._rank % stage, layout.num_ranks, stage)
        self.tp = self._group(self._block(tp, 1))
        # What is handed on along a sequence stays apart from sums over the same ranks.
        shared = self._block(replica, tp)
        self.cp, self.cp_back = [self._new(shared), self._new(shared)] if cp > 1 else [self._group(shared)] * 2
        summed = self._block(stage, tp)
        self.dp = self._group(summed)
        self.node = self.nodes = None
        if size := layout.node_replicas:
            node, place = divmod(summed.index(self._rank), size)
            self.node = self._new(summed[node * size : (node + 1) * size])
            self.nodes = self._new(summed[place::size])
        self.pp = self._group(stages)
        ends = [stages[0], stages[-1]] if layout.pp > 1 and self._rank in (stages[0], stages[-1]) else [self._rank]
        self.ends = self._new(ends)

    def _block(self, size: int, step: int) -> list[int]:
        """Return the ranks of this rank's block of `size` that lie whole steps from it."""
        first = self._rank - self._rank % size
        return list(range(first + self._rank % step, first + size, step))

    def _group(self, ranks: Sequence[int], **options: Any) -> dist.ProcessGroup:
        key = tuple(ranks)
        if key not in self._made:
            self._made[key] = self._new(key, **options)
        return self._made[key]

    @staticmethod
    def _new(ranks: Sequence[int], **options: Any) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), use_local_synchronization=True, **options)

    @contextmanager
    def given_to_megatron(self) -> Iterator[None]:
        """Give Megatron these groups instead of new ones; a set of ranks that none of them has becomes one more."""
        make = dist.new_group

        def new_group(ranks: Sequence[int], *, group_desc: str | None = None, **_: Any) -> Any:
            if self._rank not in ranks:
                return dist.GroupMember.NON_GROUP_MEMBER
            if group_desc == "EMBEDDING_GROUP":
                return self.ends
            with patch.object(torch.distributed, "new_group", make):
                return self._group(ranks, group_desc=group_desc)

        with patch.object(torch.distributed, "new_group", new_group):
            yield


def open_rings(groups: Sequence[dist.ProcessGroup]) -> None:
    """Exchange one number in each group over the CPU, so that the ranks it connects are known to be there.

    Called by all ranks, with groups in the same order.
    """
    for group in dict.fromkeys(groups):
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1), group=group)
