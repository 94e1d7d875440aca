"""Who updates which matrix: shares of equal cost, with equal shapes together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The update of one parameter.

    Attributes:
        name: Of the parameter.
        cost: In any unit.
        shape: What is updated in one batch with others of the same shape.
        due: What is due together, such as a cadence: it is distributed evenly by itself.
    """

    name: str
    cost: float
    shape: Hashable
    due: Hashable = None


def assign_owners(work: Sequence[Work], owners: int) -> dict[str, int]:
    """Give each parameter to an owner, the same on every rank that asks.

    What is due together is distributed by itself, costly shapes first, so that every step is balanced. Of equal shapes
    an owner takes a run at a time: its part of them, so that state is balanced too, as far as its share of the cost
    has room. No owner has more than the mean and the largest single cost.

    Args:
        work: All updates.
        owners: Their number.

    Returns:
        The owner of each parameter, from 0.
    """
    together: dict[Hashable, list[Work]] = defaultdict(list)
    for each in work:
        together[each.due].append(each)
    total, result = [0.0] * owners, {}
    for members in together.values():
        load = [0.0] * owners
        fair = sum(each.cost for each in members) / owners
        for alike in _by_shape(members):
            part = math.ceil(len(alike) / owners)
            while alike:
                owner = min(range(owners), key=lambda i: (load[i], total[i], i))
                count = max(1, min(part, int((fair - load[owner]) / alike[0].cost * (1 + 1e-9))))
                for each in alike[:count]:
                    result[each.name] = owner
                    load[owner] += each.cost
                    total[owner] += each.cost
                alike = alike[count:]
    return result


def _by_shape(members: Iterable[Work]) -> list[list[Work]]:
    """Return what has equal shapes and cost, costly ones first."""
    alike: dict[tuple, list[Work]] = defaultdict(list)
    for each in members:
        alike[each.shape, each.cost].append(each)
    return sorted(alike.values(), key=lambda group: -group[0].cost)


def buckets(names: Iterable[str], owners: Mapping[str, int], sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Cut parameters into buckets in which every owner's part has about the same size.

    Args:
        names: What is to be sent.
        owners: Of each.
        sizes: Entries of each.
        room: Entries of an owner's part of a bucket, which a single parameter may exceed.
    """
    result: list[list[str]] = []
    place: dict[int, tuple[int, int]] = {}
    for name in names:
        index, used = place.get(owners[name], (0, 0))
        if used and used + sizes[name] > room:
            index, used = index + 1, 0
        place[owners[name]] = index, used + sizes[name]
        if index == len(result):
            result.append([])
        result[index].append(name)
    return result
