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
from hopescale.cost.device_memory import least_memory
from hopescale.cost.params import count_params

_SIGNS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def check_device_memory(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone exceed the device's memory, as a plan counts.

    Activations are left out: a plan estimates parts of them, and what fits must not be refused.

    Raises:
        ConfigError: With both sizes.
    """
    count = count_params(config.model)["total"]
    need = least_memory(config, layout)
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        share = f" on each of {layout.num_ranks} ranks" if layout.num_ranks > 1 else ""
        raise ConfigError(
            f"the model has {format_count(count)} parameters, whose weights and optimizer state take "
            f"{format_bytes(int(need))}{share}, but {device} has {format_bytes(have)}",
            "lower model.d_model, model.num_layers, model.vocab_size or the levels' d_ff",
        )


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
