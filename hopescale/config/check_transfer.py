"""Checks of learning rates of another width: only what has been derived is allowed (`docs/width_transfer.md`)."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins
from hopescale.config.schema import RunConfig

TRANSFERS = ("adamw", "muon", "m3", "delta_momentum")
"""Update rules whose steps follow the width by a factor on the learning rate."""


def rates_follow_the_width(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """With other update rules a factor on the rate does not make steps alike."""
    hint = f"use {', '.join(TRANSFERS)}, or leave model.transfer out"
    for name, group in _groups(config):
        if group.rule not in TRANSFERS:
            message = f"no factor makes the learning rate of {group.rule} hold at another width than model.transfer"
            yield Problem(f"optim.groups.{name}.rule", message, hint=hint)


def updates_have_a_known_length(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Settings with which an update's length depends on that of gradients in another way than the rest."""
    used, m3 = {group.rule for _, group in _groups(config)}, config.optim.m3
    unscaled = "paper" if m3.form == "paper" else m3.adjust_lr_fn
    if "m3" in used and m3.second_moment and unscaled is not None:
        message = f"true with {unscaled}: updates as long as gradients are short, which model.transfer has no rate for"
        yield Problem("optim.m3.second_moment", message, hint="set it to false, or use update_rms")
    delta = config.optim.delta_momentum
    if "delta_momentum" in used and delta.form == "paper" and delta.delta:
        message = "paper erases less of memories at each larger width, which model.transfer has no rate for"
        yield Problem("optim.delta_momentum.form", message, hint="use unit")


def _groups(config: RunConfig) -> list:
    return [] if config.model.transfer is None else list(config.optim.groups.items())


CHECKS: tuple[Check, ...] = (rates_follow_the_width, updates_have_a_known_length)
