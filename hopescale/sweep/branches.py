"""Horizons of one size as branches of one run (WSD-S, arXiv 2410.05192): their common steps are trained once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schedule import decay_begin
from hopescale.config.show import diff, format_diff
from hopescale.sweep.trial import Branch, Trial

_OWN = ("name", "train.steps")
"""Keys in which the horizons of one size differ."""


def branch_off(trials: Sequence[Trial], origin: str) -> list[Trial]:
    """Let the shorter horizons of every size branch off its longest where their decay begins.

    Up to there a run of its own has the same rates and reads the same text, so that a branch is that run, bit for bit.

    Args:
        trials: Trials of a sweep, in its order.
        origin: File of the sweep, for messages.

    Returns:
        The trials in the same order; the longest of each size keeps the checkpoints that others need.

    Raises:
        ConfigError: If the horizons of a size differ in more than their steps, or their rate is not that of `wsd`.
    """
    replaced: dict[str, Trial] = {}
    problems: list[Problem] = []
    for group in horizons(trials):
        *shorter, trunk = group
        problems += _problems(trunk, shorter, origin)
        steps = [decay_begin(trial.config.optim.schedule, trial.steps) for trial in shorter]
        replaced |= {
            trial.name: replace(trial, branch=Branch(trunk.name, step))
            for trial, step in zip(shorter, steps, strict=True)
        }
        kept = tuple(sorted({*steps, *trunk.config.checkpoint.keep_at}))
        checkpoint = replace(trunk.config.checkpoint, keep_at=kept)
        overrides = (*trunk.overrides, f"checkpoint.keep_at=[{','.join(map(str, kept))}]")
        config = replace(trunk.config, checkpoint=checkpoint)
        replaced[trunk.name] = replace(trunk, config=config, overrides=overrides)
    if problems:
        raise ConfigError(problems)
    return [replaced[trial.name] for trial in trials]


def horizons(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Return the trials of every size that differ in their horizon alone, the shortest first and the trunk last."""
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        labels = [f"{name}={value}" for name, value in trial.labels.items() if name != "budget"]
        groups.setdefault((trial.series, *labels), []).append(trial)
    return [sorted(group, key=lambda trial: trial.steps) for group in groups.values()]


def saving(trials: Iterable[Trial]) -> tuple[int, int]:
    """Return the training FLOPs that trials spend, and those of as many runs that share nothing."""
    spent = apart = 0
    for trial in trials:
        spent, apart = spent + trial.flops_spent, apart + trial.flops
    return spent, apart


def _problems(trunk: Trial, shorter: Sequence[Trial], origin: str) -> list[Problem]:
    schedule, found = trunk.config.optim.schedule, []
    if schedule.name != "wsd":
        message = f"is {schedule.name}, whose rate at a step depends on the horizon [trial {trunk.name}]"
        return [
            Problem("optim.schedule.name", message, origin=origin, hint="branches need wsd: set it, or no `branch`")
        ]
    for trial in shorter:
        changes = [change for change in diff(trial.config, trunk.config) if change[0] not in _OWN]
        if changes:
            text = format_diff(changes).replace("\n", ", ")
            message = f"{trial.name} and {trunk.name} would share a run, but differ: {text}"
            hint = "give rules that know neither D, C nor steps, such as those of N and d_model"
            found.append(Problem(changes[0][0], message, origin=origin, hint=hint))
        elif (begin := decay_begin(schedule, trial.steps)) >= trial.steps:
            is_warm_up = schedule.warmup_steps >= trial.steps
            key = "warmup_steps" if is_warm_up else "decay_fraction"
            message = f"{getattr(schedule, key):g} leaves {trial.name}, of {trial.steps} steps, none to decay"
            hint = f"set it {'lower' if is_warm_up else 'higher'}, or leave the shortest horizons out"
            found.append(Problem(f"optim.schedule.{key}", message, origin=origin, hint=hint))
        elif begin < 1:
            message = f"{schedule.decay_fraction:g} leaves {trial.name} no step before its decay"
            found.append(Problem("optim.schedule.decay_fraction", message, origin=origin, hint="set it below 1"))
    return found
