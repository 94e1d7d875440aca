"""The largest micro batch with which a step fits a device: what `train.micro_batch_size: auto` means. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.units import format_bytes
from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.device_memory import MOST_BLOCKS
from hopescale.cost.hardware import CPU_CORE, DEVICES, trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.pace import memory_pace
from hopescale.cost.search import USABLE, fullest


@dataclass(frozen=True)
class AutoBatch:
    """A micro batch that was chosen, with the bytes of the fullest rank and those that a step may take.

    Attributes:
        at_once: Micro batches of a step that ranks work on at the same time, at least.
    """

    size: int
    peak: float
    room: float
    at_once: int = 1

    def describe(self, device: str) -> str:
        """Say which micro batch was chosen, and why."""
        need, room = format_bytes(int(self.peak)), format_bytes(int(self.room))
        several = f", with {self.at_once} or more in a step" if self.at_once > 1 else ""
        return (
            f"train.micro_batch_size: {self.size}, the most of which a step fits {device}{several}: "
            f"{need} of {room} by its plan"
        )


def choose_micro_batch(config: RunConfig, layout: Layout, device: str, memory: float) -> AutoBatch:
    """Choose the largest micro batch that divides a replica's part of the batch and fits.

    Ranks that wait for one another, stages or those that share sequences, work on several micro batches of a step at
    the same time: sizes that leave them as many are looked at, or one sequence if the part has no more. Those that
    share sequences work on one if a GPU runs the heads of all of them at once, since half would take as long.

    Args:
        config: Config that has passed its checks on the layout; its own micro batch does not matter.
        layout: Degrees of parallelism.
        device: Name of each rank's device; `cpu` is a CPU, any other a GPU.
        memory: Bytes that a rank's device has, of which a plan fills `USABLE`.

    Raises:
        ConfigError: If a step does not fit with one sequence at a time either.
    """
    room = USABLE * memory
    if config.model.num_layers > MOST_BLOCKS:
        raise ConfigError(
            [Problem("train.micro_batch_size", "auto cannot be planned for so many blocks", hint="set a number")]
        )
    share, least = _share(config, layout), 0.0
    at_once = min(_at_once(config, layout, device), share)
    for size in (size for size in range(share // at_once, 0, -1) if _divides(size, config, layout)):
        least = planned_bytes(with_micro_batch(config, size), layout, device)
        if least <= room:
            return AutoBatch(size, least, room, at_once)
    message = (
        f"auto, but none fits: a step of one sequence takes {format_bytes(int(least))} by its plan, and "
        f"{format_bytes(int(room))} of {device}'s {format_bytes(int(memory))} can be filled"
    )
    hint = "see `hopescale plan` for a change that fits: train.recompute, train.seq_len, more ranks"
    raise ConfigError([Problem("train.micro_batch_size", message, hint=hint)])


def _at_once(config: RunConfig, layout: Layout, device: str) -> int:
    """Return how many micro batches a step should have; of a GPU that is not known, as on an H100."""
    if layout.pp > 1 or layout.cp == 1:
        return layout.pp
    whole = with_micro_batch(trained_on(config, device), _share(config, layout))
    paces = memory_pace(whole, layout, CPU_CORE if device == "cpu" else DEVICES.get(device, DEVICES["H100"]))
    return 1 if any(pace["waves"] == 1 for pace in paces.values()) else 2


def _share(config: RunConfig, layout: Layout) -> int:
    """Count the sequences of a step that each replica reads."""
    return config.train.global_batch_tokens // config.train.seq_len // layout.dp


def _divides(size: int, config: RunConfig, layout: Layout) -> bool:
    """Tell whether micro batches of a size make up a replica's part of the batch, in groups where stages interleave."""
    share, together = _share(config, layout), layout.pp if layout.virtual_stages > 1 else 1
    return share % size == 0 and share // size % together == 0


def keeps(size: int, config: RunConfig, layout: Layout, device: str, memory: float) -> bool:
    """Tell whether a run that goes on keeps the micro batch that it had: where it divides its part and fits at all.

    The arguments are those of `choose_micro_batch`.
    """
    if not _divides(size, config, layout):
        return False
    return planned_bytes(with_micro_batch(config, size), layout, device) <= memory


def planned_bytes(config: RunConfig, layout: Layout, device: str) -> float:
    """Return the bytes of the fullest rank by its plan."""
    config = trained_on(config, device)
    return fullest(Holdings(config), config, layout, exact=True)


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """Return a config with another micro batch."""
    return replace(config, train=replace(config.train, micro_batch_size=size))
