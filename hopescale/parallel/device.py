"""Where to compute."""

from __future__ import annotations

import os

import torch

from hopescale.common.errors import ConfigError, LaunchError
from hopescale.common.rank_info import RankInfo

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the variable that settles how torch keeps a GPU's memory: all versions know the first."""
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variable with the number of queues between a process and a GPU."""


def settle_cuda(tp: int) -> None:
    """Set the environment variables that torch and CUDA read at their start; those that a user has set stay.

    Memory grows in segments that expand, so that the sizes of logged steps and slow levels leave no holes. `tp` is the
    number of tensor-parallel ranks: where there are several, work is done in the order in which it is queued, which
    Megatron's layers count on to overlap sums with products.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    if tp > 1:
        os.environ.setdefault(_QUEUES, "1")


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
