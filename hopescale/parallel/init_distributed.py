"""How a process of a job comes to its device and its place in the mesh."""

from __future__ import annotations

import faulthandler
from datetime import timedelta

import torch

from hopescale.common.rank_info import RankInfo
from hopescale.config.layout import Layout
from hopescale.parallel import process
from hopescale.parallel.device import choose_device, own_device
from hopescale.parallel.mesh import Mesh


def init_distributed(
    rank_info: RankInfo | None, layout: Layout, device: str, origin: str, *, timeout: timedelta
) -> tuple[Mesh, torch.device]:
    """Meet the other ranks. Called by all of them, once per process.

    Args:
        rank_info: Which rank this process is; None is the only one.
        layout: How the ranks are distributed.
        device: As of `choose_device`.
        origin: The key or option that asked for it, for messages.
        timeout: How long an exchange may wait for the other ranks.

    Returns:
        The mesh and this rank's device.

    Raises:
        ConfigError: If the device is unknown or missing.
        LaunchError: If the ranks do not meet, or there are too few devices.
    """
    chosen = choose_device(device, origin)
    if rank_info is None or rank_info.world_size == 1:
        return Mesh.alone(), chosen
    faulthandler.enable()
    if chosen.type == "cuda":
        chosen = own_device(rank_info, origin)
    process.start(rank_info, chosen, timeout)
    return Mesh.over_all(layout, device=chosen, timeout=timeout), chosen
