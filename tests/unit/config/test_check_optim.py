"""Every setting of an update rule acts, or is refused."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature

import pytest

from hopescale.config.check import check
from hopescale.config.check_optim import MATRIX_RULES
from hopescale.config.load import load_recipe
from hopescale.config.schema import GroupConfig, OptimConfig
from hopescale.optim.rules import RULES
from hopescale.optim.stacked import StackedOptimizer

MATRICES = "optim.groups.matrices={rule: RULE, match: ['*_proj.weight']}"
ALL = ("optim.groups.no_decay=null", "optim.groups.decay.rule=muon")
TP2 = "parallel.tp=2"


def using(rule: str) -> str:
    return MATRICES.replace("RULE", rule)


BROKEN = [
    (["optim.muon.momentum=0.9"], "optim.muon.momentum", "no group has rule: muon"),
    ([using("muon"), "optim.m3.form=paper"], "optim.m3.form", "no group has rule: m3"),
    ([using("m3"), "optim.delta_momentum.delta=1"], "optim.delta_momentum.delta", "no group has rule: delta_momentum"),
    ([using("m3"), "optim.deep_momentum.alpha=1"], "optim.deep_momentum.alpha", "no group has rule: deep_momentum"),
    ([*ALL, "optim.betas=[0.8, 0.9]"], "optim.betas", "no group has rule: adamw"),
    ([*ALL, "optim.eps=1e-4"], "optim.eps", "no group has rule: adamw"),
    (
        ["optim.weight_decay=0.2", "optim.groups.decay.weight_decay=0.1"],
        "optim.weight_decay",
        "every group has weight_decay of its own",
    ),
    (
        [*ALL[:1], "optim.groups.decay.betas=[0.8, 0.9]", "optim.betas=[0.7, 0.9]"],
        "optim.betas",
        "every group has betas of its own",
    ),
    ([using("muon"), "optim.groups.matrices.betas=[0.8, 0.9]"], "optim.groups.matrices.betas", "rule is muon"),
    ([using("dgd"), "optim.groups.matrices.betas=[0.8, 0.9]"], "optim.groups.matrices.betas", "rule is dgd"),
    ([using("m3"), "optim.m3.alpha_slow=0", "optim.m3.frequency=2"], "optim.m3.frequency", "alpha_slow is 0"),
    ([using("m3"), "optim.m3.second_moment=false", "optim.m3.eps=1"], "optim.m3.eps", "second_moment is false"),
    ([using("m3"), "optim.m3.form=paper", "optim.m3.nesterov=true"], "optim.m3.nesterov", "form is paper"),
    ([using("m3"), "optim.m3={update_rms: 1, adjust_lr_fn: original}"], "optim.m3.update_rms", "sets the scale too"),
    ([using("delta_momentum"), "optim.delta_momentum.eps=1"], "optim.delta_momentum.eps", "beta2 is null"),
    (
        [using("deep_momentum"), "optim.deep_momentum={memory: linear, memory_dim: 4}"],
        "optim.deep_momentum.memory_dim",
        "memory is linear",
    ),
    ([using("m3"), "optim.m3.beta1=1"], "optim.m3.beta1", "in (0, 1)"),
    ([using("m3"), "parallel.zero=2"], "parallel.zero", "(matrices) need them whole"),
    ([*ALL, "parallel.zero=1"], "parallel.zero", "shards groups with rule: adamw"),
    ([using("m3"), "optim.tp_mode=gather"], "optim.tp_mode", "parallel.tp is 1"),
    ([TP2, "optim.tp_mode=gather"], "optim.tp_mode", "every group has rule: adamw"),
    ([TP2, using("deep_momentum")], "optim.tp_mode", "a memory for each whole matrix"),
]


def problems_of(*overrides: str) -> list:
    loaded = load_recipe("debug", overrides)
    return check(loaded.config, loaded.origins)


@pytest.mark.parametrize(("overrides", "key", "message"), BROKEN)
def test_each_rule_names_its_key(overrides: list[str], key: str, message: str):
    problems = problems_of(*overrides)
    assert [problem.key for problem in problems] == [key] and message in problems[0].message


@pytest.mark.parametrize(
    "overrides",
    [
        *([using(rule)] for rule in MATRIX_RULES),
        [*ALL],
        [using("m3"), "parallel.zero=1"],
        [using("m3"), "optim.m3={form: paper, alpha_slow: 0, second_moment: false, ns_dtype: bf16}"],
        [using("m3"), "optim.m3.adjust_lr_fn=match_rms_adamw", "optim.m3.nesterov=true"],
        [using("delta_momentum"), "optim.delta_momentum={beta2: 0.9, eps: 1e-4}"],
        [using("deep_momentum"), TP2, "optim.tp_mode=gather"],
        [using("muon"), TP2],
    ],
    ids=str,
)
def test_good_configs_pass(overrides: list[str]):
    assert problems_of(*overrides) == []


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_settings_are_those_of_the_rule(rule: str):
    """Names and defaults; rate and decay are the group's, and DGD has nothing else."""
    arguments = {
        name: each for name, each in signature(RULES[rule].rule).parameters.items() if each.kind is each.KEYWORD_ONLY
    }
    arguments |= signature(StackedOptimizer).parameters | signature(RULES[rule]).parameters
    settings = getattr(OptimConfig(), rule, None)
    names = set() if settings is None else {field.name for field in fields(settings)}
    others = {"params", "lr", "settings", "weight_decay", "ns_coefficients"} | ({"blocks"} - names)
    assert ("blocks" in names) == (rule in ("muon", "m3")) and names == arguments.keys() - others
    for name in names:
        default, same = getattr(settings, name), arguments[name].default
        assert default == same or (rule, name, default) == ("muon", "adjust_lr_fn", "original"), name


def test_the_rules_of_the_schema_are_those_there_are():
    assert tuple(RULES) == MATRIX_RULES
    assert GroupConfig().rule == "adamw"
