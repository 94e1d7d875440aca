"""Between equal parts of flat tensors and the owners of their pieces: all-to-alls of several tensors at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.optim.owned_flat import OwnedFlat
from hopescale.parallel.tiers import Tiers

WINDOW_ELEMENTS = 1 << 23
"""Most entries of equal parts that go to or come from owners at once."""


class OwnerExchanges:
    """All-to-alls of flat tensors of the same replicas; which entries go where is found once for each set of them.

    Args:
        tiers: Replicas, which are the owners.
    """

    def __init__(self, tiers: Tiers):
        self._tiers = tiers
        self._known: dict[tuple[int, ...], _Exchange] = {}

    def to_owners(self, flats: Sequence[OwnedFlat]) -> None:
        """Hand the sums in all replicas' parts on to their owners; elsewhere zeros are left."""
        for exchange in self._of(flats):
            exchange.to_owners()

    def to_parts(self, flats: Sequence[OwnedFlat]) -> None:
        """Hand what owners hold to the replicas of which it is a part."""
        for exchange in self._of(flats):
            exchange.to_parts()

    def _of(self, flats: Sequence[OwnedFlat]) -> Iterator[_Exchange]:
        """Yield the exchanges of flat tensors, those of one type together."""
        if self._tiers.group.size() == 1:
            return
        for dtype in dict.fromkeys(each.flat.dtype for each in flats):
            alike = [each for each in flats if each.flat.dtype == dtype]
            key = tuple(map(id, alike))
            if key not in self._known:
                self._known[key] = _Exchange(alike, self._tiers)
            yield self._known[key]


@dataclass(frozen=True)
class _Side:
    """What a replica sends or receives in an all-to-all.

    Attributes:
        pieces: Numbers of flat tensors and entries of each, in the order in which they travel.
        counts: Entries for each replica, or from it.
    """

    pieces: list[tuple[int, range]]
    counts: list[int]

    @classmethod
    def of(cls, peers: Sequence[Sequence[range]]) -> _Side:
        """Return the side with the entries of each flat tensor for every replica."""
        pieces: list[tuple[int, range]] = []
        for number, entries in ((number, each) for of_peer in peers for number, each in enumerate(of_peer) if each):
            if pieces and pieces[-1][0] == number and pieces[-1][1].stop == entries.start:
                entries = range(pieces.pop()[1].start, entries.stop)
            pieces.append((number, entries))
        return cls(pieces, [sum(map(len, of_peer)) for of_peer in peers])


class _Exchange:
    """All-to-alls of flat tensors of one type, in windows: the parts of all tensors count as one, cut evenly."""

    def __init__(self, flats: Sequence[OwnedFlat], tiers: Tiers):
        self._flats, self._group = flats, tiers.group
        ends = [0, *accumulate(each.part for each in flats)]
        self._windows: list[tuple[_Side, _Side]] = []
        here, replicas = self._group.rank(), range(self._group.size())
        for begin in range(0, ends[-1], WINDOW_ELEMENTS):
            window = range(begin, min(begin + WINDOW_ELEMENTS, ends[-1]))
            inside = [
                range(max(window.start - start, 0), max(min(window.stop - start, each.part), 0))
                for start, each in zip(ends, flats, strict=False)
            ]
            parts = [
                [each.entries_of(tiers.part_of(replica), span) for each, span in zip(flats, inside, strict=True)]
                for replica in replicas
            ]
            owned = [[each.owned_by(replica) for each in flats] for replica in replicas]
            of_part = _Side.of([list(map(_overlap, parts[here], of_owner)) for of_owner in owned])
            of_owner = _Side.of([list(map(_overlap, of_replica, owned[here])) for of_replica in parts])
            self._windows.append((of_part, of_owner))

    def to_owners(self) -> None:
        for of_part, of_owner in self._windows:
            # The rest of this replica's parts is sent later: no piece lies there that comes from another.
            self._exchange(of_part, of_owner)
        for each in self._flats:
            each.clear_others()

    def to_parts(self) -> None:
        for of_part, of_owner in self._windows:
            self._exchange(of_owner, of_part)

    def _exchange(self, sent: _Side, received: _Side) -> None:
        views, places = self._views(sent), self._views(received)
        source = views[0] if len(views) == 1 else self._joined(views)
        # What is sent and what is received may not overlap: a part and what is owned of it do.
        is_place = len(places) == 1 and len(views) != 1
        into = places[0] if is_place else source.new_empty(sum(received.counts))
        dist.all_to_all_single(into, source, received.counts, sent.counts, group=self._group)
        if places and not is_place:
            torch._foreach_copy_(places, list(into.split([place.numel() for place in places])))

    def _views(self, side: _Side) -> list[Tensor]:
        return [self._flats[number].flat[each.start : each.stop] for number, each in side.pieces]

    def _joined(self, views: list[Tensor]) -> Tensor:
        return torch.cat(views) if views else self._flats[0].flat.new_empty(0)


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))
