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
from hopescale.cost.params import count_params

_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 4, 12)}
"""Per parameter: weight; gradient sum; two moments, with a master if there is one. Activations come on top."""

_SIGNS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def check_device_memory(config: RunConfig, layout: Layout, device: torch.device) -> None:
    """Refuse a model whose weights and optimizer state alone exceed the device's memory, split over ranks evenly.

    Raises:
        ConfigError: With both sizes.
    """
    count = count_params(config.model)["total"]
    weight, gradient, state = _BYTES[config.train.precision]
    zero, dp = config.parallel.zero, layout.dp
    each = weight / (dp if zero == 3 else 1) + gradient / (dp if zero > 1 else 1) + state / (dp if zero else 1)
    need = int(count * each / (layout.tp * layout.pp))
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    else:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        share = f" on each of {layout.num_ranks} ranks" if layout.num_ranks > 1 else ""
        raise ConfigError(
            f"the model has {format_count(count)} parameters, whose weights and optimizer state take "
            f"{format_bytes(need)}{share}, but {device} has {format_bytes(have)}",
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
