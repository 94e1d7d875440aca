"""Sizes that no device can hold: refused before anything is allocated, explained if they fail later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hopescale.common.errors import ConfigError
from hopescale.common.units import format_bytes, format_count
from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.device_memory import MOST_BLOCKS, least_memory
from hopescale.cost.hardware import trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.params import count_params
from hopescale.cost.search import USABLE, fullest

_SIGNS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def check_device_memory(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """Refuse a run that by its plan exceeds the device's memory: what lasts alone, or a whole step.

    Raises:
        ConfigError: With both sizes.
    """
    count, have = count_params(config.model)["total"], memory_of(device)
    need = least_memory(config, layout)
    share = f" on each of {layout.num_ranks} ranks" if layout.num_ranks > 1 else ""
    if need > have:
        raise ConfigError(
            f"the model has {format_count(count)} parameters, whose weights and optimizer state take "
            f"{format_bytes(int(need))}{share}, but {device} has {format_bytes(have)}",
            "lower model.d_model, model.num_layers, model.vocab_size or the levels' d_ff",
        )
    if (planned := _planned(config, layout, device)) > have:
        raise ConfigError(
            f"a step takes {format_bytes(planned)}{share} by its plan, {format_bytes(need)} of it for weights, "
            f"gradients and optimizer, but {device} has {format_bytes(have)}",
            "see `hopescale plan` for a change that fits: train.micro_batch_size, train.recompute, more ranks",
        )


def tight_memory(config: RunConfig, layout: Layout, device: torch.device) -> str | None:
    """Return a sentence about a run that fills more of the device than a plan would; None for others."""
    planned, have = _planned(config, layout, device), memory_of(device)
    if planned <= USABLE * have:
        return None
    return (
        f"a step takes {format_bytes(planned)} by its plan, more than the {USABLE:.0%} of {device}'s "
        f"{format_bytes(have)} that are safe to fill"
    )


def _planned(config: RunConfig, layout: Layout, device: torch.device) -> float:
    """Return the bytes of the fullest rank; 0 for a model of too many blocks to list."""
    if config.model.num_layers > MOST_BLOCKS:
        return 0.0
    config = trained_on(config, device.type)
    return fullest(Holdings(config), config, layout, exact=True)


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device's memory, of a CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def memory_errors_explained(config: RunConfig) -> Iterator[None]:
    """Turn torch's failure to allocate into one message about the sizes that decide it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        train, count = config.train, format_count(count_params(config.model)["total"])
        raise ConfigError(
            f"out of memory: train.micro_batch_size={train.micro_batch_size} sequences of "
            f"train.seq_len={train.seq_len} tokens do not fit beside {count} parameters",
            "lower train.micro_batch_size first (the result is the same), then train.seq_len or the model",
        ) from error
