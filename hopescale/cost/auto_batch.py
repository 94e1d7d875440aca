"""The largest micro batch with which a step fits a device: what `train.micro_batch_size: auto` means. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.units import format_bytes
from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.device_memory import MOST_BLOCKS
from hopescale.cost.hardware import trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.search import USABLE, fullest


@dataclass(frozen=True)
class AutoBatch:
    """A micro batch that was chosen, with the bytes of the fullest rank and those that a step may take."""

    size: int
    peak: float
    room: float

    def describe(self, device: str) -> str:
        """Say what was chosen and why."""
        need, room = format_bytes(int(self.peak)), format_bytes(int(self.room))
        return (
            f"train.micro_batch_size: {self.size}, the most of which a step fits {device}: {need} of {room} by its plan"
        )


def choose_micro_batch(config: RunConfig, layout: Layout, device: str, memory: float) -> AutoBatch:
    """Choose the largest micro batch that divides a replica's part of the batch and fits.

    Args:
        config: Config that has passed its checks on the layout; its own micro batch does not matter.
        layout: Degrees of parallelism.
        device: Name of what each rank computes on; `cpu` is a CPU, any other a GPU.
        memory: Bytes that a rank's device has, of which a plan fills `USABLE`.

    Raises:
        ConfigError: If a step does not fit with one sequence at a time either.
    """
    train, room = config.train, USABLE * memory
    if config.model.num_layers > MOST_BLOCKS:
        raise ConfigError(
            [Problem("train.micro_batch_size", "auto cannot be planned for so many blocks", hint="set a number")]
        )
    share = train.global_batch_tokens // train.seq_len // layout.dp
    together = layout.pp if layout.virtual_stages > 1 else 1  # micro batches interleave in groups
    config = trained_on(config, device)
    holdings, least = Holdings(with_micro_batch(config, 1)), 0.0
    for size in (size for size in range(share, 0, -1) if share % size == 0 and share // size % together == 0):
        least = fullest(holdings, with_micro_batch(config, size), layout, exact=True)
        if least <= room:
            return AutoBatch(size, least, room)
    message = (
        f"auto, but none fits: a step of one sequence takes {format_bytes(int(least))} by its plan, and "
        f"{format_bytes(int(room))} of {device}'s {format_bytes(int(memory))} can be filled"
    )
    hint = "see `hopescale plan` for a change that fits: train.recompute, train.seq_len, more ranks"
    raise ConfigError([Problem("train.micro_batch_size", message, hint=hint)])


def kept_size(before: RunConfig, config: RunConfig, layout: Layout) -> int | None:
    """Return the micro batch of a run that goes on with another config, if it divides the batch of a replica there."""
    size, train = before.train.micro_batch_size, config.train
    share = train.global_batch_tokens // train.seq_len // layout.dp
    return None if size == "auto" or share % size else size


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """Return a config with another micro batch."""
    return replace(config, train=replace(config.train, micro_batch_size=size))
