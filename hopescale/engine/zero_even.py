"""ZeRO stage 1 without a framework: one flat tensor of what is updated together, in equal shards over replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import EVEN_UNIT
from hopescale.optim import Cadence, RuleGroup
from hopescale.optim.cadence import Accumulator
from hopescale.optim.wire import SentSum
from hopescale.parallel.deferred import move_into
from hopescale.parallel.node_flat import NodeFlat
from hopescale.parallel.tiers import Tiers


class FlatAccumulator(Accumulator):
    """Sum of a parameter's gradients, a part of the sums of its set, which the set makes and clears.

    Args:
        parameter, cadence: Arguments of `Accumulator`.
        make: Function that returns this part, after it has made all of the sums if there are none.
        arrived: Function to call when a gradient has been added.
    """

    def __init__(self, parameter: Tensor, cadence: Cadence, make: Callable[[], Tensor], arrived: Callable[[], None]):
        super().__init__(parameter, cadence, make() if cadence.period > 1 else None)
        self._make, self._arrived = make, arrived

    def take(self, _: Tensor | None = None) -> None:
        """Add the parameter's gradient to the sum and clear it."""
        if self.parameter.grad is not None:
            self.accumulated_grad()
            super().take()
            self._arrived()

    def accumulated_grad(self) -> Tensor:
        """Return the sum so far: zeros if there was no gradient."""
        if self.total is None:
            self.total = self._make()
        return self.total


@dataclass(frozen=True)
class GroupPart:
    """What a replica's shard has of a group.

    Attributes:
        group: Name of the group.
        master: Masters.
        moments: Moments of AdamW.
        start, stop: Its place in the shard.
    """

    group: str
    master: nn.Parameter
    moments: dict[str, Tensor]
    start: int
    stop: int


class EvenShards:
    """Parameters of one type that are updated together, their masters and moments in equal shards over replicas.

    All of them are one flat tensor, the members of a group side by side, filled up so that every replica has an equal
    part, cut wherever it falls. Gradients add up in a flat tensor too. One reduce-scatter sums it to the shards, AdamW
    (`EvenAdamW`) steps on what each group has of a shard, and one all-gather hands out the weights: nothing is packed,
    and neither the number of exchanges nor that of updates depends on how many replicas or parameters there are. A
    float32 weight is its own master.

    With nodes no whole sum outlives a step: what waits is held in shares of the replicas of a node (`Tiers`). If it
    `flushes`, none outlives a backward pass either: it is summed inside the node as soon as all of it is there.

    Args:
        parameters: Parameters by name, on one device; their storage becomes part of the flat tensor.
        groups: Groups that share settings, every parameter in one.
        cadence: Cadence of all of them.
        tiers: Replicas.
        flushes: Whether gradients are summed inside the node in each backward pass, where there are nodes.
        shares: Whether replicas of a node share the weights out too.

    Attributes:
        accumulators: Sums of gradients by parameter.
        node_flat: Weights that are whole only while they are used; None if they are always.
        own, master: This replica's shard of the weights and of their float32 masters.
        parts: Parts of the shard that belong to groups.
        updates: Number of updates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        cadence: Cadence,
        tiers: Tiers,
        flushes: bool = False,
        shares: bool = False,
    ):
        self.parameters, self._tiers, replicas = dict(parameters), tiers, tiers.group.size()
        self._cadence = cadence
        self._sent: SentSum | None = None
        first = next(iter(self.parameters.values()))
        self.is_low_precision = first.dtype != torch.float32
        self._persists = cadence.period > 1 and not tiers.has_nodes
        self._spans, end = {}, 0
        of_groups: list[tuple[RuleGroup, int, int]] = []
        for group in groups:
            begin = end
            for name in group.members:
                self._spans[name] = end, (end := end + self.parameters[name].numel())
            of_groups.append((group, begin, end))
        self._size = -(-end // (EVEN_UNIT * replicas)) * EVEN_UNIT
        self._first = tiers.part * self._size
        self._weights = first.new_zeros(self._size * replicas, requires_grad=False)
        for name, parameter in self.parameters.items():
            span = range(*self._spans[name])
            drawn = tiers.share_of_span(len(self._weights), span) if shares else None
            move_into(parameter, self._weights[span.start : span.stop].view_as(parameter), drawn)
        self.node_flat = NodeFlat(self._weights, tiers) if shares else None
        self.own = self.node_flat.own if shares else tiers.own(self._weights)
        self.master = self.own.float()
        self.updates, self._sums, self._gradient = torch.tensor(0.0), None, None
        self._work: dist.Work | None = None
        self._gathering: dist.Work | None = None
        self._moments = {key: torch.zeros_like(self.master) for key in ("exp_avg", "exp_avg_sq")}
        self.parts = [part for group, *span in of_groups if (part := self._part_of(group, *span)) is not None]
        self._is_reduced = False
        self._held = None
        self._flushes, self._missing = flushes and tiers.has_nodes, set(self.parameters)
        if self._flushes or (tiers.has_nodes and cadence.period > 1):
            self._held = torch.zeros_like(tiers.share(self._weights), dtype=torch.float32)
        lasting = cadence if self._persists else Cadence()
        self.accumulators = {
            name: FlatAccumulator(parameter, lasting, self._maker(name), partial(self._arrive, name))
            for name, parameter in self.parameters.items()
        }
        if shares:
            self.node_flat.free()

    def _part_of(self, group: RuleGroup, begin: int, end: int) -> GroupPart | None:
        start, stop = self._here(begin, end)
        if start == stop:
            return None
        moments = {key: moment[start:stop] for key, moment in self._moments.items()}
        return GroupPart(group.name, nn.Parameter(self.master[start:stop]), moments, start, stop)

    def _here(self, begin: int, end: int) -> tuple[int, int]:
        """Return what this replica has of a span of the flat tensor, in entries of its shard."""
        start, stop = (min(max(place - self._first, 0), self._size) for place in (begin, end))
        return start, stop

    def _maker(self, name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            return self._all_sums()[slice(*self._spans[name])].view_as(self.parameters[name])

        return make

    def _arrive(self, name: str) -> None:
        assert not self._is_reduced, f"a gradient of {name} came after its sum had begun"
        self._missing.discard(name)
        if self._flushes and not self._missing:
            self.hold()

    def _all_sums(self) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros_like(self._weights, dtype=torch.float32)
        return self._sums

    def reduce(self) -> None:
        """Begin to sum the accumulated gradients over replicas, in place, each part where its master is; once."""
        if self._is_reduced:
            return
        self._is_reduced = True
        self.settle()  # of what no forward pass has run
        if self._flushes:
            self.hold()
            self._gradient, self._work = (
                self._tiers.own_of_share(self._held),
                self._tiers.begin_sum_of_shares(self._held),
            )
            return
        if self._cadence.moves:
            if not self._cadence.lag:
                self.send()
            return
        sums = self._all_sums()
        self._gradient, self._work = self._tiers.own(sums), self._tiers.begin_sum(sums, self._held)

    def hold(self) -> None:
        """Sum inside the node what is not summed there yet, and hold it, if there are nodes."""
        if self._held is not None and self._sums is not None:
            self._tiers.hold(self._all_sums(), self._held)
            self._drop_sums()

    def send(self) -> None:
        """Take the sums out, but for what the wire rounds away, and begin to add them up over replicas."""
        self._sent = SentSum(self._all_sums(), self._tiers.group, self._cadence.wire)

    def sent_sums(self) -> dict[str, Tensor]:
        """Return what adds up over replicas to the totals that wait for their updates. All replicas call."""
        if self._sent is None:
            return {}
        whole = self._sent.share()
        return {name: whole[slice(*span)].view_as(self.parameters[name]) for name, span in self._spans.items()}

    def send_again(self, totals: Mapping[str, Tensor]) -> None:
        """Put totals, in parts that add up over replicas, or nothing in the place of what is on its way."""
        self._drop_sent()
        if totals:
            whole = torch.zeros_like(self._weights, dtype=torch.float32)
            for name, span in self._spans.items():
                whole[slice(*span)].copy_(totals[name].flatten())
            self._sent = SentSum(whole, self._tiers.group)

    def _drop_sent(self) -> None:
        if self._sent is not None:
            self._sent.share()
        self._sent = self._gradient = None

    def finish(self) -> None:
        """Wait for a sum that has begun."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def settle(self) -> None:
        """Wait for weights that are on their way."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def _clear(self) -> None:
        if self._held is not None:
            self._held.zero_()
        if self._persists:
            self._all_sums().zero_()
            return
        self._drop_sums()

    def _drop_sums(self) -> None:
        self._sums, self._missing = None, set(self.parameters)
        for accumulator in self.accumulators.values():
            accumulator.total = None

    def take_gradient(self) -> Tensor:
        """Return the gradients here, to be changed: the update uses them up."""
        gradient, self._gradient = self._own_gradient(), None
        return gradient

    def end_update(self) -> None:
        """Begin a new period after an update of the shard, and to gather the weights."""
        if not self._cadence.moves:
            self._clear()
        self._is_reduced = False
        self.updates += 1
        self.begin_to_hand_out()

    def begin_to_hand_out(self) -> None:
        """Begin to gather the weights from the parts of all replicas; of weights that are shared out, the share."""
        shared = self.node_flat
        self._gathering = self._tiers.begin_to_gather(self._weights) if shared is None else shared.begin_to_hand_out()

    def gathered(self) -> list[Tensor]:
        """Return the sums that are here, of a replica and of what is held, to be changed in place."""
        return [sums for sums in (self._sums, self._held) if sums is not None]

    def discard(self) -> None:
        """Drop all gradients, and begin a new period."""
        self.finish()
        self._drop_sent()
        self._clear()
        self._is_reduced = False

    @property
    def waits_here(self) -> bool:
        """Whether nothing but what is held for a later step is here."""
        return self._held is not None and self._sums is None

    def held_part(self, name: str) -> tuple[int, Tensor]:
        """Return what this replica holds of the node's sum of a parameter, and where it begins in the flattened one."""
        share, span = self._tiers.share_range(len(self._weights)), range(*self._spans[name])
        here = self._tiers.share_of_span(len(self._weights), span)
        first = span.start + here.start - share.start
        return here.start, self._held[first : first + len(here)]

    def start_of(self, name: str) -> int:
        """Return where this replica's part of a parameter begins, in entries of the flattened parameter."""
        begin, end = self._spans[name]
        return min(max(self._first - begin, 0), end - begin)

    def part(self, name: str, key: str) -> Tensor:
        """Return this replica's part of a parameter's tensor: a view, maybe empty.

        The tensors are `weight`, `master`, `gradient`, `exp_avg` and `exp_avg_sq`.
        """
        start, stop = self._here(*self._spans[name])
        if key == "gradient":
            return self._own_gradient()[start:stop]
        whole = {"weight": self.own, "master": self.master}
        return (whole[key] if key in whole else self._moments[key])[start:stop]

    def step_of(self, name: str) -> Tensor:
        """Return the number of updates of a parameter, a view shared by all of its set."""
        return self.updates

    def _own_gradient(self) -> Tensor:
        self.finish()
        if self._sent is not None:
            self._gradient, self._sent = self._sent.finish(), None
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.master)
        return self._gradient
