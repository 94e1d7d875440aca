"""The update rules for matrices by name: their settings from the config, and the settings that decide their state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from hopescale.common.errors import ConfigError
from hopescale.config.schema import OptimConfig
from hopescale.cost.updates import DEEP_MEMORY_DIM
from hopescale.ops.device import DTYPES
from hopescale.optim.deep_momentum import DeepMomentum
from hopescale.optim.delta_momentum import DeltaMomentum
from hopescale.optim.dgd import DGD
from hopescale.optim.m3 import M3
from hopescale.optim.muon import Muon
from hopescale.optim.stacked import StackedOptimizer

RULES: dict[str, type[StackedOptimizer]] = {
    "muon": Muon,
    "m3": M3,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "dgd": DGD,
}
_STATE: dict[str, dict[str, Callable[[Any], Any]]] = {
    "m3": {"alpha_slow": bool, "second_moment": bool},
    "delta_momentum": {"beta2": lambda rate: rate is None},
    "deep_momentum": {"memory": str, "memory_dim": lambda dim: dim or DEEP_MEMORY_DIM},
}
"""Settings by which a rule keeps other tensors, and what of them decides."""


def make_rule(name: str, groups: Iterable[dict[str, Any]], config: OptimConfig) -> StackedOptimizer:
    """Return a rule of `RULES` over torch's parameter groups, whose are learning rate and weight decay."""
    section = getattr(config, name, None)
    settings = {} if section is None else asdict(section)
    if settings.get("ns_dtype") is not None:
        settings["ns_dtype"] = DTYPES[settings["ns_dtype"]]
    return RULES[name](groups, **settings)


def refuse_idle_blocks(groups: Mapping[str, str], fused: Collection[str], config: OptimConfig) -> None:
    """Refuse blocks of matrices for a rule that updates no fused matrix.

    Args:
        groups: Group of every parameter of the whole model, as `assign_groups` returns it: a pipeline stage alone may
            hold none of the fused ones.
        fused: Names of all parameters whose `ParameterSpec` has parts.
        config: Settings of the groups and rules.

    Raises:
        ConfigError: Naming the setting.
    """
    rules = {name: config.groups[group].rule for name, group in groups.items()}
    cut = {rules[name] for name in fused}
    for rule in sorted({*rules.values()} & {"muon", "m3"} - cut):
        if (blocks := getattr(config, rule).blocks) != "matrix":
            message = f"optim.{rule}.blocks is {blocks}, but no group with rule: {rule} has a fused in-projection"
            raise ConfigError(message, f"set it to matrix, or let a group of {rule} match *_proj.weight")


def changed_state(name: str, old: OptimConfig, new: OptimConfig) -> list[str]:
    """Return the settings of a rule that differ so that its state is made of other tensors, in dotted keys."""
    before, after = getattr(old, name, None), getattr(new, name, None)
    return [
        f"optim.{name}.{setting}"
        for setting, decides in _STATE.get(name, {}).items()
        if decides(getattr(before, setting)) != decides(getattr(after, setting))
    ]
