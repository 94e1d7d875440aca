"""Which of a job's processes this is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """One rank among all ranks of a job.

    Attributes:
        rank: Counted over all nodes.
        world_size: Ranks of the job.
        local_rank: Counted on this node; chooses the CUDA device.
        address: Host of rank 0, where all ranks meet.
        port: TCP port on that host.
        bound: Whether a scheduler may have shown this process its own device alone.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    bound: bool = False
