"""Checks of update rules: each setting has a group, and a way, in which it acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, set_keys
from hopescale.config.schema import OptimConfig, RunConfig

MATRIX_RULES = ("muon", "m3", "delta_momentum", "deep_momentum", "dgd")

_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[OptimConfig], bool]], ...] = (
    (("m3.beta3", "m3.frequency"), "m3.alpha_slow is 0", lambda optim: optim.m3.alpha_slow != 0),
    (("m3.beta2", "m3.eps"), "m3.second_moment is false", lambda optim: optim.m3.second_moment),
    (
        ("m3.nesterov", "m3.update_rms", "m3.adjust_lr_fn"),
        "m3.form is paper, which has none",
        lambda optim: optim.m3.form != "paper",
    ),
    (("delta_momentum.eps",), "delta_momentum.beta2 is null", lambda optim: optim.delta_momentum.beta2 is not None),
    (
        ("deep_momentum.memory_dim",),
        "deep_momentum.memory is linear",
        lambda optim: optim.deep_momentum.memory != "linear",
    ),
)
"""Keys below `optim`, why they may have no effect, and when they do have one."""


def rules_of(optim: OptimConfig) -> set[str]:
    """Return the names of the update rules in use."""
    return {group.rule for group in optim.groups.values() if group is not None}


def settings_need_a_group_with_the_rule(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Settings of a rule that no group has would do nothing."""
    for rule in sorted({"adamw", *MATRIX_RULES} - rules_of(config.optim)):
        sections = ("optim.betas", "optim.eps") if rule == "adamw" else (f"optim.{rule}",)
        for key in (key for section in sections for key in set_keys(config, origins, section)):
            hint = f"leave it out, or set optim.groups.NAME.rule={rule}"
            yield Problem(key, f"has no effect: no group has rule: {rule}", hint=hint)


def settings_need_each_other(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A rule has settings that act with others of its settings only."""
    used = rules_of(config.optim)
    for names, reason, acts in _NEEDS:
        if names[0].partition(".")[0] not in used or acts(config.optim):
            continue
        for key in (key for name in names for key in set_keys(config, origins, f"optim.{name}")):
            yield Problem(key, f"has no effect: optim.{reason}", hint="leave it out")


def one_setting_scales_the_updates_of_m3(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """An update has one scale."""
    m3 = config.optim.m3
    if m3.update_rms is not None and m3.adjust_lr_fn is not None:
        message = f"{m3.update_rms:g}, but optim.m3.adjust_lr_fn = {m3.adjust_lr_fn} sets the scale too"
        yield Problem("optim.m3.update_rms", message, hint="leave one of them null")


def betas_belong_to_adamw(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The rules for matrices have decay rates of their own."""
    for name, group in config.optim.groups.items():
        if group.betas is not None and group.rule != "adamw":
            there = hasattr(config.optim, group.rule)
            hint = f"leave it out; the settings of {group.rule} are in optim.{group.rule}" if there else "leave it out"
            yield Problem(f"optim.groups.{name}.betas", f"has no effect: rule is {group.rule}", hint=hint)


def matrices_are_not_cut(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """DeepSpeed shards AdamW's groups; the others are distributed in whole matrices, which need whole gradients."""
    zero, used = config.parallel.zero, rules_of(config.optim)
    if zero >= 1 and "adamw" not in used:
        message = f"{zero} has no effect: it shards groups with rule: adamw, and there is none"
        yield Problem("parallel.zero", message, hint="set parallel.zero=0; the states of other rules are distributed")
    elif zero >= 2 and (rules := sorted(used - {"adamw"})):
        groups = ", ".join(name for name, group in config.optim.groups.items() if group.rule in rules)
        message = f"{zero} cuts the gradients of matrices to pieces, but groups with other rules than adamw ({groups})"
        yield Problem("parallel.zero", f"{message} need them whole", hint="with these rules, 1 is the most")


def tp_mode_needs_split_matrices(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Matrices are gathered from several ranks, for a rule that looks at matrices."""
    tp, used = config.parallel.tp, rules_of(config.optim) - {"adamw"}
    key, mode = "optim.tp_mode", config.optim.tp_mode
    for _ in set_keys(config, origins, key):
        if tp == 1:
            yield Problem(key, f"{mode} has no effect: parallel.tp is 1", hint="leave it out, or raise parallel.tp")
        elif not used:
            yield Problem(key, f"{mode} has no effect: every group has rule: adamw", hint="leave it out")


def deep_momentum_needs_whole_matrices(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The memory of a slice would be of use to no other layout."""
    tp, mode = config.parallel.tp, config.optim.tp_mode
    if tp is not None and tp > 1 and mode == "shard" and "deep_momentum" in rules_of(config.optim):
        message = f"{mode}, but deep_momentum keeps a memory for each whole matrix, and parallel.tp is {tp}"
        yield Problem("optim.tp_mode", message, hint="set optim.tp_mode=gather")


CHECKS: tuple[Check, ...] = (
    settings_need_a_group_with_the_rule,
    settings_need_each_other,
    one_setting_scales_the_updates_of_m3,
    betas_belong_to_adamw,
    matrices_are_not_cut,
    tp_mode_needs_split_matrices,
    deep_momentum_needs_whole_matrices,
)
