"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from hopescale.config.schedule import decay_begin
from hopescale.config.schema import ScheduleConfig


def learning_rate(step: int, peak: float, total_steps: int, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1.

    Steps beyond `total_steps` keep the last rate. `wsd` is warm-up, stable, linear decay (MiniCPM, arXiv 2404.06395).
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "cosine":
        begin, shape = schedule.warmup_steps, lambda x: 0.5 * (1 + math.cos(math.pi * x))
    else:
        begin, shape = decay_begin(schedule, total_steps), lambda x: 1 - x
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape(progress))
