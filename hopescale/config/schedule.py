"""Where the parts of a learning-rate schedule begin. Imports no torch."""

from __future__ import annotations

from hopescale.config.schema import ScheduleConfig


def decay_begin(schedule: ScheduleConfig, total_steps: int) -> int:
    """Return the last step of the peak rate under `wsd`; warm-up and peak are the same for every longer horizon."""
    return max(schedule.warmup_steps, total_steps - round(schedule.decay_fraction * total_steps))
