"""How fast ranks exchange tensors: within each node, from node to node, and all together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

_REPEATS = 3
_NUM_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}


@dataclass
class LinkTimes:
    """Times that one rank has measured, in seconds; infinite where an exchange failed.

    Attributes:
        within: All-reduce over the ranks of its node; None where it is the only one.
        pairs: Exchange with the neighbours of its node, by name; empty but on each node's first rank.
        bandwidth: Bytes per second and rank of an all-reduce over all ranks; None if it failed or sums were wrong.
    """

    within: float | None = None
    pairs: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None


def measure(nodes: Sequence[str], device: torch.device, barrier: Callable[[], object]) -> LinkTimes:
    """Measure the links of this rank. Called by all ranks, in the group of all.

    Nodes exchange with their neighbours in a ring, so that each meets two others: one that is slow with both is at
    fault, one that is slow with one has a neighbour at fault.

    Args:
        nodes: Name of the node of each rank.
        device: Device of this rank.
        barrier: Waits until all ranks are there; must not rest on the links.
    """
    rank, links = dist.get_rank(), LinkTimes()
    tensor = torch.zeros(_NUM_BYTES[device.type] // 4, device=device)
    names = list(dict.fromkeys(nodes))
    members = {name: [other for other, node in enumerate(nodes) if node == name] for name in names}
    for name in names:
        group = dist.new_group(members[name]) if len(members[name]) > 1 else None
        if group is not None and nodes[rank] == name:
            links.within = _timed(lambda group=group: dist.all_reduce(tensor, group=group), device)
    leaders = {members[name][0]: name for name in names}
    for edges in _rounds(names):
        barrier()
        for pair in edges:
            if rank in leaders and nodes[rank] in pair:
                other = pair[1 - pair.index(nodes[rank])]
                first, peer = pair.index(nodes[rank]) == 0, members[other][0]
                links.pairs[other] = _timed(lambda first=first, peer=peer: _swap(tensor, peer, first), device)
    barrier()
    seconds, size = _timed(lambda: dist.all_reduce(tensor), device), len(nodes)
    if math.isfinite(seconds) and _sums_are_right(tensor, rank, size):
        links.bandwidth = 2 * (size - 1) / size * tensor.nbytes / seconds
    return links


def _rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Split the ring of nodes into rounds in which no node has two neighbours."""
    if len(names) < 3:
        return [[(names[0], names[1])]] if len(names) == 2 else []
    ring = list(zip(names, [*names[1:], names[0]], strict=True))
    last = [ring.pop()] if len(ring) % 2 else []
    return [edges for edges in (ring[::2], ring[1::2], last) if edges]


def _swap(tensor: torch.Tensor, peer: int, first: bool) -> None:
    for sends in (first, not first):
        if sends:
            dist.send(tensor, peer)
        else:
            dist.recv(tensor, peer)


def _timed(exchange: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of a few exchanges, after one that makes the connection."""
    fastest = math.inf
    try:
        for attempt in range(_REPEATS + 1):
            begin = time.perf_counter()
            exchange()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if attempt:
                fastest = min(fastest, time.perf_counter() - begin)
    except RuntimeError:  # what torch raises for connections that break or time out
        return math.inf
    return fastest


def _sums_are_right(tensor: torch.Tensor, rank: int, size: int) -> bool:
    tensor.fill_(rank + 1)
    try:
        dist.all_reduce(tensor)
    except RuntimeError:
        return False
    return bool((tensor == size * (size + 1) / 2).all())
