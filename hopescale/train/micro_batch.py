"""The micro batch of `train.micro_batch_size: auto` at a start: the largest that fits, or the one of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hopescale.checkpoint.manifest import Manifest, read_manifest
from hopescale.config.check import check_layout
from hopescale.config.load import from_dict
from hopescale.cost.auto_batch import choose_micro_batch, keeps, with_micro_batch
from hopescale.train.device_memory import RankMemory, check_device_memory, run_here
from hopescale.train.folder import RunFolder
from hopescale.train.request import RunRequest
from hopescale.train.starting_point import choose_checkpoint, manifest_ahead


def settle_micro_batch(
    request: RunRequest,
    checkpoint: Path | None,
    memory: RankMemory,
    read: Callable[[Path], Manifest] = read_manifest,
) -> tuple[RunRequest, str | None]:
    """Return the request with a number of sequences, and a sentence about it if the config says `auto`.

    A run that goes on keeps its own number where that divides the batch and fits.

    Args:
        request: Start of the run.
        checkpoint: Checkpoint that it goes on from; None begins anew.
        memory: Bytes of the device of the rank that has least.
        read: Function that returns the checkpoint's manifest.

    Raises:
        ConfigError: If a step fits the device with no micro batch.
        CheckpointError: If the checkpoint cannot be read.
    """
    config, layout = request.loaded.config, request.layout
    if config.train.micro_batch_size != "auto":
        return request, None
    check_device_memory(config, layout, memory)  # what cannot fit anyhow is said as ever
    was = None if checkpoint is None else _size_in(read(checkpoint), str(checkpoint))
    where = (run_here(config, memory.device), layout, memory.device.type, memory.bytes)
    if was is not None and keeps(was, *where):
        return _with_size(request, was), f"train.micro_batch_size: {was}, as before"
    chosen = choose_micro_batch(*where)
    before = "" if was in (None, chosen.size) else f"; it was {was}"
    return _with_size(request, chosen.size), chosen.describe(str(memory.device)) + before


def settle_alone(request: RunRequest, memory: RankMemory) -> tuple[RunRequest, str | None]:
    """Settle the micro batch as a start would, on one process that looks for the checkpoint itself. Writes nothing.

    Raises:
        ConfigError: If a step fits the device with no micro batch.
        CheckpointError: If the checkpoint to continue from is missing, or cannot be read.
    """
    checkpoint = choose_checkpoint(RunFolder(request.folder), request, writes=False)
    return settle_micro_batch(request, checkpoint, memory, partial(manifest_ahead, request))


def _size_in(manifest: Manifest, origin: str) -> int | None:
    """Return the sequences of a micro batch in the run that saved a checkpoint."""
    size = from_dict(manifest.config, origin).train.micro_batch_size
    return None if size == "auto" else size


def _with_size(request: RunRequest, size: int) -> RunRequest:
    """Return a request for the same run with a micro batch, whose config is checked on the layout again."""
    loaded = replace(request.loaded, config=with_micro_batch(request.loaded.config, size))
    check_layout(loaded.config, request.layout, loaded.origins)
    return replace(request, loaded=loaded)
