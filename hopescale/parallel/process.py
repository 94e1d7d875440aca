"""The process group of this process. The only place that starts or ends one."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo
from hopescale.parallel.groups import connected_when_used
from hopescale.parallel.variables import variable_set

_NCCL_WAITS = "TORCH_NCCL_BLOCKING_WAIT"
"""Variable that torch reads when it makes a group."""


def open_store(rank_info: RankInfo, timeout: timedelta, *, wait: bool = True) -> dist.TCPStore:
    """Open the store that all ranks of a job read and write; rank 0 holds it.

    It waits for `timeout` until all ranks have opened it, unless `wait` is false, and as long for a value later.

    Raises:
        LaunchError: If the ranks do not meet.
    """
    host, port, ranks = rank_info.address, rank_info.port, rank_info.world_size
    try:
        return dist.TCPStore(host, port, ranks, is_master=rank_info.rank == 0, timeout=timeout, wait_for_workers=wait)
    except dist.DistError as error:
        raise _rendezvous_error(rank_info, error) from error


def start(rank_info: RankInfo, device: torch.device, timeout: timedelta, store: dist.Store) -> None:
    """Join the group of all ranks: NCCL for tensors on CUDA, gloo for those on the CPU.

    A CUDA device becomes the current one. An exchange waits for other ranks for `timeout`.

    Raises:
        LaunchError: If the ranks do not meet.
    """
    # Megatron calls collectives by names that newer versions of torch call deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\..* is deprecated")
    if device.type != "cuda":
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        with connected_when_used():
            dist.init_process_group(
                backend, store=store, rank=rank_info.rank, world_size=rank_info.world_size, timeout=timeout
            )
    except dist.DistError as error:
        raise _rendezvous_error(rank_info, error) from error


def failures_raised() -> AbstractContextManager[None]:
    """Let groups that are made inside raise what goes wrong in the call that waits for it, on NCCL as on gloo.

    Otherwise an exchange on NCCL waits on the device, and its watchdog ends the process where the exchange hangs. A
    call then waits on the host, which costs time: for checks, not for training.
    """
    return variable_set(_NCCL_WAITS)


def _rendezvous_error(rank_info: RankInfo, error: dist.DistError) -> LaunchError:
    where = f"rank {rank_info.rank} of {rank_info.world_size} could not meet the others"
    where += f" at {rank_info.address}:{rank_info.port}"
    hint = "MASTER_ADDR must be the host of rank 0, MASTER_PORT free there, and all ranks must have been started"
    return LaunchError(f"{where}: {str(error).splitlines()[0]}", hint)


def start_alone() -> None:
    """Start a group of one process unless one is running: Megatron's layers need a group even to send nothing."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """End the groups of this process, if there are any."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
