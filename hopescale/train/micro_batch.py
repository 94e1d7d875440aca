"""What `train.micro_batch_size: auto` means for a start: the largest that fits, or the one that a run already has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hopescale.checkpoint.manager import find_checkpoint
from hopescale.checkpoint.manifest import read_manifest
from hopescale.config.load import from_dict, load_resolved
from hopescale.config.record import CONFIG
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import choose_micro_batch, kept_size, with_micro_batch
from hopescale.train.device_memory import check_device_memory, memory_of
from hopescale.train.request import RunRequest


def settle_micro_batch(request: RunRequest, device: torch.device) -> tuple[int, str | None]:
    """Return the sequences of a micro batch, and a sentence about them if the config says `auto`.

    A run that has begun keeps its own where that divides the batch.

    Raises:
        ConfigError: If a step fits the device with no micro batch.
        CheckpointError: If the checkpoint to continue from cannot be read.
    """
    config = request.loaded.config
    size = config.train.micro_batch_size
    if size != "auto":
        return size, None
    check_device_memory(with_micro_batch(config, 1), request.layout, device)  # what cannot fit anyhow is said as ever
    before = _before(request)
    if before is not None and (kept := kept_size(before, config, request.layout)) is not None:
        return kept, f"train.micro_batch_size: {kept}, as before"
    chosen = choose_micro_batch(config, request.layout, device.type, memory_of(device))
    return chosen.size, chosen.describe(str(device))


def with_size(request: RunRequest, size: int) -> RunRequest:
    """Return a request for the same run with a micro batch that was settled."""
    return replace(request, loaded=replace(request.loaded, config=with_micro_batch(request.loaded.config, size)))


def _before(request: RunRequest) -> RunConfig | None:
    """Return the config of the run that a start continues; None for a new one."""
    if isinstance(request.resume, Path):
        checkpoint = find_checkpoint(request.resume)
        return from_dict(read_manifest(checkpoint).config, str(checkpoint))
    path = request.folder / CONFIG
    return load_resolved(path) if path.exists() else None
