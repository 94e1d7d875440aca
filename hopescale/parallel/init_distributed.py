"""How a process of a job comes to its device and its place in the mesh."""

from __future__ import annotations

import faulthandler
from collections.abc import Mapping
from datetime import timedelta

import torch

from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo
from hopescale.common.software import software
from hopescale.config.layout import Layout
from hopescale.parallel import process
from hopescale.parallel.device import choose_device, own_device, settle_cuda
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.store_exchange import StoreExchange

_COMPARE_S = 120
"""Seconds for ranks that have met to say what they were started for."""


def init_distributed(
    rank_info: RankInfo | None,
    layout: Layout,
    device: str,
    origin: str,
    facts: Mapping[str, str],
    *,
    timeout: timedelta,
) -> tuple[Mesh, torch.device]:
    """Meet the other ranks, and make sure that all were started for the same. Called by all, once per process.

    Args:
        rank_info: Rank of this process; None is the only one.
        layout: Layout of the ranks.
        device: Device as of `choose_device`.
        origin: Key or option that asked for the device, for messages.
        facts: Values by name that must be the same on all ranks, besides code and packages: those of their task.
        timeout: Time that an exchange may wait for the other ranks.

    Raises:
        ConfigError: If the device is unknown or missing.
        LaunchError: If the ranks do not meet, were started for different things, or have too few devices.
    """
    chosen = choose_device(device, origin)
    if chosen.type == "cuda":
        settle_cuda(layout.tp)
    if rank_info is None or rank_info.world_size == 1:
        return Mesh.alone(), chosen
    faulthandler.enable()
    if chosen.type == "cuda":
        chosen = own_device(rank_info, origin)
    store = process.open_store(rank_info, timeout)
    meeting = StoreExchange(store, rank_info.rank, rank_info.world_size, _COMPARE_S)
    meeting.compare(what_runs(rank_info, facts))
    if missing := set(range(rank_info.world_size)) - meeting.expected:
        meeting.leave()
        message = f"ranks {sorted(missing)} did not say within {_COMPARE_S} s what they were started for"
        raise LaunchError(message, "they have died, or run another version of hopescale")
    process.start(rank_info, chosen, timeout, store)
    return Mesh.over_all(layout, device=chosen, timeout=timeout), chosen


def what_runs(rank_info: RankInfo, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that must be the same on all ranks: their number, code, packages, and the run they belong to."""
    return {"the number of ranks": str(rank_info.world_size), **software(), **facts}
