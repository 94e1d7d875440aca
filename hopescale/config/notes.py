"""Notes on settings that are allowed but perhaps not meant; printed before the training, and no error."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.config.model_shape import phases
from hopescale.config.schema import RunConfig


def notes(config: RunConfig) -> list[str]:
    """Return a sentence for each thing of a checked config that its run will not come to."""
    return [*_schedule(config), *_levels(config)]


def _schedule(config: RunConfig) -> Iterator[str]:
    steps, schedule = config.train.steps, config.optim.schedule
    if schedule.warmup_steps >= steps:
        most = config.optim.lr * steps / schedule.warmup_steps
        yield (
            f"optim.schedule.warmup_steps={schedule.warmup_steps} is not below train.steps={steps}: the learning rate "
            f"only rises, to {most:.3g} of optim.lr={config.optim.lr:g}"
        )


def _levels(config: RunConfig) -> Iterator[str]:
    """Name the levels that are due at no step, or at one alone."""
    steps = config.train.steps
    for name, level in config.model.cms.levels.items():
        period = level.update_every_steps
        of_blocks = list(phases(config.model, name).values()) if level.rolling else [level.phase]
        counts = [(max(0, steps - level.lag) + phase) // period - phase // period for phase in of_blocks]
        if max(counts) == 0:
            yield f"level {name} is due at no step up to train.steps={steps}; its weights stay"
        elif min(counts) == 0:
            where = f"{counts.count(0)} of {len(counts)} blocks"
            yield f"level {name} is due at no step up to train.steps={steps} in {where}, where its weights stay"
        elif max(counts) == 1 and period > 1:
            when = ", ".join(str(period - phase + level.lag) for phase in sorted(set(of_blocks), reverse=True))
            yield f"level {name} is due once up to train.steps={steps}, at step {when}"
