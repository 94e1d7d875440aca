"""Where to compute."""

from __future__ import annotations

import torch

from hopescale.common.errors import ConfigError, LaunchError
from hopescale.common.rank_info import RankInfo


def choose_device(name: str, origin: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; `auto` takes CUDA where there is one.

    Messages name `origin`, the key or option that the name came from.

    Raises:
        ConfigError: If the name is unknown, or asks for CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{origin} is {name!r}, but must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(f"{origin} is cuda, but this machine has no usable CUDA device", f"set {origin} to auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def own_device(rank_info: RankInfo, origin: str) -> torch.device:
    """Return the CUDA device of a rank: by its number on the node, or the only one it is shown.

    Raises:
        LaunchError: If the node has fewer devices than ranks; `origin` is the key or option that chose CUDA.
    """
    count = torch.cuda.device_count()
    if count == 1 and rank_info.bound:
        return torch.device("cuda", 0)
    if rank_info.local_rank >= count:
        message = f"rank {rank_info.rank} is number {rank_info.local_rank} of its node, which has {count} CUDA devices"
        raise LaunchError(message, f"start one rank per device, or set {origin} to cpu")
    return torch.device("cuda", rank_info.local_rank)
