"""Checks of `optim`: each setting has a group, and a way, in which it acts."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, set_keys
from hopescale.config.schema import GroupConfig, RunConfig

MATRIX_RULES = ("muon", "m3", "delta_momentum", "deep_momentum", "dgd")
TRANSFERS = ("adamw", "muon", "m3", "delta_momentum")
"""Update rules whose steps follow the width by a factor on the learning rate (`docs/width_transfer.md`)."""


def groups(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Every parameter belongs to a group: exactly one group has no patterns, and takes the parameters that are left."""
    rest = [name for name, group in config.optim.groups.items() if group.match is None]
    if len(rest) != 1:
        message = f"{len(rest)} groups have match: null ({', '.join(rest) or 'none'}), exactly one must"
        yield Problem("optim.groups", message, hint="that group takes all parameters no other group matches")
    for name, group in config.optim.groups.items():
        if group.match is not None and not all(group.match or [""]):
            hint = f"remove the group with optim.groups.{name}=null"
            yield Problem(f"optim.groups.{name}.match", "holds no pattern, or an empty one", hint=hint)
        if group.betas is not None and group.rule != "adamw":
            there = hasattr(config.optim, group.rule)
            hint = f"leave it out; the settings of {group.rule} are in optim.{group.rule}" if there else "leave it out"
            yield Problem(f"optim.groups.{name}.betas", f"has no effect: rule is {group.rule}", hint=hint)


def settings_act(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A setting has a group with its rule, other settings with which it acts, a schedule or a level that uses it."""
    optim, used = config.optim, _rules(config)

    def idle(key: str, reason: str, hint: str = "leave it out") -> Iterator[Problem]:
        return (
            Problem(key, f"has no effect: {reason}", hint=hint) for key in set_keys(config, origins, f"optim.{key}")
        )

    if optim.schedule.name != "wsd":
        yield from idle("schedule.decay_fraction", f"schedule.name is {optim.schedule.name}")
    if all(level.update_every_steps <= 1 for level in config.model.cms.levels.values()):
        for key in set_keys(config, origins, "optim.accumulate"):
            message = f"{optim.accumulate} has no effect: no level has update_every_steps above 1"
            yield Problem(key, message, hint="leave it out")
    for rule in sorted({"adamw", *MATRIX_RULES} - used):
        for key in ("betas", "eps") if rule == "adamw" else (rule,):
            yield from idle(key, f"no group has rule: {rule}", f"leave it out, or set optim.groups.NAME.rule={rule}")
    for key, users in (("weight_decay", optim.groups.values()), ("betas", _adamw(config))):
        if users and all(getattr(group, key) is not None for group in users):
            yield from idle(key, f"every group has {key} of its own")
    m3 = optim.m3
    unused = (
        ("m3", m3.alpha_slow == 0, "alpha_slow is 0", ("beta3", "frequency")),
        ("m3", not m3.second_moment, "second_moment is false", ("beta2", "eps")),
        ("m3", m3.form == "paper", "form is paper, which has none", ("nesterov", "update_rms", "adjust_lr_fn")),
        ("delta_momentum", optim.delta_momentum.beta2 is None, "beta2 is null", ("eps",)),
        ("deep_momentum", optim.deep_momentum.memory == "linear", "memory is linear", ("memory_dim",)),
    )
    for rule, is_unused, reason, names in unused:
        for name in names if rule in used and is_unused else ():
            yield from idle(f"{rule}.{name}", f"optim.{rule}.{reason}")
    if m3.update_rms is not None and m3.adjust_lr_fn is not None:
        message = f"{m3.update_rms:g}, but optim.m3.adjust_lr_fn = {m3.adjust_lr_fn} sets the scale too"
        yield Problem("optim.m3.update_rms", message, hint="leave one of them null")


def matrices_are_whole(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """DeepSpeed shards AdamW's groups; the others are distributed in whole matrices, which need whole gradients."""
    zero, tp, used = config.parallel.zero, config.parallel.tp, _rules(config)
    key, mode, others = "optim.tp_mode", config.optim.tp_mode, used - {"adamw"}
    if zero >= 1 and "adamw" not in used:
        message = f"{zero} has no effect: it shards groups with rule: adamw, and there is none"
        yield Problem("parallel.zero", message, hint="set parallel.zero=0; the states of other rules are distributed")
    elif config.parallel.shard == "all" and "adamw" not in used:
        message = "all has no effect: it shards groups with rule: adamw, and there is none"
        yield Problem("parallel.shard", message, hint="leave it out; the states of other rules are distributed")
    elif zero >= 2 and others:
        names = ", ".join(name for name, group in config.optim.groups.items() if group.rule in others)
        message = f"{zero} cuts the gradients of matrices to pieces, but groups with other rules than adamw ({names})"
        yield Problem(
            "parallel.zero",
            f"{message} need them whole",
            hint="with these rules, 1 is the most, or parallel.shard=node",
        )
    if set_keys(config, origins, key) and tp == 1:
        yield Problem(key, f"{mode} has no effect: parallel.tp is 1", hint="leave it out, or raise parallel.tp")
    elif set_keys(config, origins, key) and not others:
        yield Problem(key, f"{mode} has no effect: every group has rule: adamw", hint="leave it out")
    if tp is not None and tp > 1 and mode == "shard" and "deep_momentum" in used:
        message = f"{mode}, but deep_momentum keeps a memory for each whole matrix, and parallel.tp is {tp}"
        yield Problem(key, message, hint="set optim.tp_mode=gather")


def rates_follow_the_width(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Learning rates of another width are allowed only where they were derived (`docs/width_transfer.md`)."""
    if config.model.transfer is None:
        return
    optim, used = config.optim, _rules(config)
    m3, delta = optim.m3, optim.delta_momentum
    for name, group in optim.groups.items():
        if group.rule not in TRANSFERS:
            message = f"no factor makes the learning rate of {group.rule} hold at another width than model.transfer"
            hint = f"use {', '.join(TRANSFERS)}, or leave model.transfer out"
            yield Problem(f"optim.groups.{name}.rule", message, hint=hint)
    for rule in ("muon", "m3"):
        if rule in used and (blocks := getattr(optim, rule).blocks) != "matrix":
            message = f"{blocks} gives matrices of other shapes than model.transfer has rates for"
            yield Problem(f"optim.{rule}.blocks", message, hint="set it to matrix, or leave model.transfer out")
    unscaled = "paper" if m3.form == "paper" else m3.adjust_lr_fn
    if "m3" in used and m3.second_moment and unscaled is not None:
        message = f"true with {unscaled}: updates as long as gradients are short, which model.transfer has no rate for"
        yield Problem("optim.m3.second_moment", message, hint="set it to false, or use update_rms")
    if "delta_momentum" in used and delta.form == "paper" and delta.delta:
        message = "paper erases less of memories at each larger width, which model.transfer has no rate for"
        yield Problem("optim.delta_momentum.form", message, hint="use unit")


def _adamw(config: RunConfig) -> list[GroupConfig]:
    """Return the groups that AdamW updates."""
    return [group for group in config.optim.groups.values() if group.rule == "adamw"]


def _rules(config: RunConfig) -> set[str]:
    """Return the names of the update rules in use."""
    return {group.rule for group in config.optim.groups.values()}


CHECKS: tuple[Check, ...] = (groups, settings_act, matrices_are_whole, rates_follow_the_width)
