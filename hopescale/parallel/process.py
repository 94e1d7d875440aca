"""The process group of this process. The only place that starts or ends one."""

from __future__ import annotations

import torch.distributed as dist


def start_alone() -> None:
    """Start a group of one process unless one is running: Megatron's layers need a group even to send nothing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """End the group of this process, if one is running."""
    if dist.is_initialized():
        dist.destroy_process_group()
