"""Sizes that no device can hold: refused before anything is allocated, explained if they fail later."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from hopescale.common.errors import ConfigError
from hopescale.common.machine import machine_memory
from hopescale.common.units import format_bytes, format_count
from hopescale.config.layout import Layout
from hopescale.config.model_shape import self_modifying_mixers
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import planned_bytes, with_micro_batch
from hopescale.cost.device_memory import MOST_BLOCKS, least_memory
from hopescale.cost.params import count_params
from hopescale.cost.search import USABLE
from hopescale.ops.backends import unsupported_reason
from hopescale.parallel.control import Control

_SIGNS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank can have of its device: of a GPU those that are free or its own, of a CPU an equal share.

    Attributes:
        device: Device of the rank.
        bytes: Bytes for this rank.
        ranks: Ranks that share the machine's memory; 1 on a GPU.
    """

    device: torch.device
    bytes: float
    ranks: int = 1

    def __str__(self) -> str:
        free = " free" if self.device.type == "cuda" else ""
        share = f" for each of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{format_bytes(self.bytes)}{free}{share}"


def memory_of(device: torch.device, ranks: int = 1) -> RankMemory:
    """Return the memory that a rank can have of its device now; `ranks` are those on this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return RankMemory(device, free + torch.cuda.memory_reserved(device))
    return RankMemory(device, machine_memory() // ranks, ranks)


def ranks_here(control: Control) -> int:
    """Count the ranks on this machine. Called by all ranks."""
    name = socket.gethostname()
    return control.gather(name).count(name)


def least_of_all(control: Control, memory: RankMemory) -> RankMemory:
    """Return the memory of the rank that has least. Called by all ranks."""
    return min(control.gather(memory), key=lambda each: each.bytes)


def check_device_memory(config: RunConfig, layout: Layout, memory: RankMemory) -> None:
    """Refuse a run whose plan exceeds the device's memory, by its lasting tensors alone or by a whole step.

    A micro batch that is not chosen yet counts as one sequence.

    Raises:
        ConfigError: With both sizes.
    """
    count, have = count_params(config.model)["total"], memory.bytes
    need = least_memory(config, layout)
    share = f" on each of {layout.num_ranks} ranks" if layout.num_ranks > 1 else ""
    if need > have:
        raise ConfigError(
            f"the model has {format_count(count)} parameters, whose weights and optimizer state take "
            f"{format_bytes(int(need))}{share}, but {memory.device} has {memory}",
            "lower model.d_model, model.num_layers, model.vocab_size or the levels' d_ff",
        )
    if (planned := _planned(config, layout, memory.device)) > have:
        raise ConfigError(
            f"a step takes {format_bytes(planned)}{share} by its plan, {format_bytes(need)} of it for weights, "
            f"gradients and optimizer, but {memory.device} has {memory}",
            "see `hopescale plan` for a change that fits: train.micro_batch_size, train.recompute, more ranks",
        )


def tight_memory(config: RunConfig, layout: Layout, memory: RankMemory) -> str | None:
    """Return a sentence about a run that fills more of the device than a plan would; None for others."""
    planned = _planned(config, layout, memory.device)
    if planned <= USABLE * memory.bytes:
        return None
    return (
        f"a step takes {format_bytes(planned)} by its plan, more than the {USABLE:.0%} of {memory} that "
        f"are safe to fill on {memory.device}"
    )


def _planned(config: RunConfig, layout: Layout, device: torch.device) -> float:
    """Return the bytes of the fullest rank; 0 for a model of too many blocks to list."""
    if config.model.num_layers > MOST_BLOCKS:
        return 0.0
    if config.train.micro_batch_size == "auto":
        config = with_micro_batch(config, 1)
    return planned_bytes(run_here(config, device), layout, device.type)


def run_here(config: RunConfig, device: torch.device) -> RunConfig:
    """Return a config for a plan, in which code that this machine cannot run leaves all to torch's operations."""
    code = "triton" if device.type == "cuda" else "cpp"
    has_use = code == "triton" or self_modifying_mixers(config.model)
    if config.train.backend == "auto" and has_use and unsupported_reason(code, device.type) is not None:
        return replace(config, train=replace(config.train, backend="torch"))
    return config


@contextmanager
def memory_errors_explained(config: RunConfig) -> Iterator[None]:
    """Turn torch's failure to allocate into one message about the sizes that decide it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        train, count = config.train, format_count(count_params(config.model)["total"])
        size, lower = train.micro_batch_size, "lower train.micro_batch_size first"
        if size == "auto":
            size, lower = "auto, one or more", "set train.micro_batch_size=1 first"
        raise ConfigError(
            f"out of memory: train.micro_batch_size={size} sequences of train.seq_len={train.seq_len} tokens do not "
            f"fit beside {count} parameters",
            f"{lower} (the result is the same), then train.seq_len or the model",
        ) from error
