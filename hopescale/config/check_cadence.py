"""Checks of the cadences of levels: rolling levels, late sums, and sums that are rounded on the wire."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins
from hopescale.config.model_shape import phases
from hopescale.config.schema import RunConfig
from hopescale.config.schema.model import LevelConfig


def levels_take_turns(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A rolling level has steps, and blocks, over which it can be spread."""
    for name, level in config.model.cms.levels.items():
        key, period = f"model.cms.levels.{name}.rolling", level.update_every_steps
        if level.rolling and period == 1:
            hint = "leave it out, or raise update_every_steps"
            yield Problem(key, "true has no effect: update_every_steps is 1", hint=hint)
        elif level.rolling and period > 1 and len(phases(config.model, name)) < 2:
            message = f"true has no effect: {len(phases(config.model, name))} block has the level"
            yield Problem(key, message, hint="leave it out")


def sums_wait(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A sum arrives before the next one leaves; it leaves from an accumulator, which is whole on each replica."""
    parallel, groups = config.parallel, config.optim.groups
    for name, level in config.model.cms.levels.items():
        period = level.update_every_steps
        for key, value in _moving(level).items():
            where = f"model.cms.levels.{name}.{key}"
            if key == "lag" and level.lag >= period:
                hint = f"at most {period - 1}: a sum is applied before the next one is sent" if period > 1 else None
                yield Problem(where, f"{value} is not below update_every_steps = {period}", hint=hint)
            if key == "wire" and period == 1:
                message = f"{value} needs an accumulator that outlives a step, and update_every_steps is 1"
                yield Problem(where, message, hint="leave it out, or raise update_every_steps")
            if parallel.zero >= 2:
                message = (
                    f"{value}, but parallel.zero = {parallel.zero} sums the gradients of every backward pass at once"
                )
                yield Problem(where, message, hint="use parallel.zero of 0 or 1")
            if level.wire in ("int8", "int4") and key == "wire" and (parallel.tp or 1) > 1:
                message = (
                    f"{value} rounds a norm's sum with its neighbours, which differ between {parallel.tp} ranks of tp"
                )
                yield Problem(where, message, hint="use wire of bf16 or fp32, or parallel.tp of 1")
            if parallel.shard == "node":
                message = f"{value}, but with parallel.shard = node the accumulators are shared out inside nodes"
                yield Problem(where, message, hint="use parallel.shard of all or none")
            if any(group is not None and group.rule == "dgd" for group in groups.values()):
                message = (
                    f"{value}, but dgd sends Gram matrices beside gradients, which can be neither late nor rounded"
                )
                yield Problem(where, message, hint="use another rule")


def _moving(level: LevelConfig) -> dict[str, object]:
    """Return the settings of a level by which its sums leave their accumulators."""
    return {key: value for key, value in (("lag", level.lag), ("wire", level.wire)) if value not in (0, "fp32")}


CHECKS: tuple[Check, ...] = (levels_take_turns, sums_wait)
