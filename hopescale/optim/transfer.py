"""Learning rates that hold at another width (muP): a factor for each class of parameters and update rule.

`docs/width_transfer.md` derives the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schema import GroupConfig, ModelConfig, OptimConfig
from hopescale.config.transfer import Size, growth
from hopescale.optim.muon import adjusted_lr


@dataclass(frozen=True)
class ParameterSizes:
    """A parameter as its learning rate sees it.

    Attributes:
        shape: Shape of the whole parameter, over all ranks.
        sizes: Sizes of its `ParameterSpec`.
    """

    shape: tuple[int, ...]
    sizes: tuple[Size, ...]


def transfer_groups(
    assigned: Mapping[str, str], parameters: Mapping[str, ParameterSizes], model: ModelConfig, optim: OptimConfig
) -> tuple[dict[str, str], OptimConfig]:
    """Split groups so that each parameter has the rate that `model.transfer` asks for.

    A part of a group is called `<group>*<factor>` and has the group's `lr_scale` times the factor. Its weight decay is
    divided by the factor, so that a step takes the same share of a weight at every width. What is added to the roots of
    second moments shrinks as gradients do.

    Args:
        assigned: Group of every parameter of the whole model, as `assign_groups` returns it.
        parameters: All of them.
        model: Both are returned unchanged if it has no `transfer`.
        optim: Settings of the groups.

    Returns:
        The part of a group that each parameter belongs to, and the config with these parts as groups.

    Raises:
        ConfigError: Naming each parameter that is no linear map, but whose rule takes it for one.
    """
    if model.transfer is None:
        return dict(assigned), optim
    if problems := list(_misfits(assigned, parameters, optim.groups)):
        raise ConfigError(problems)
    grown, parts, members = growth(model), {}, {}
    for parameter, group in assigned.items():
        # Rounded as its group is named.
        factor = float(f"{rate_factor(optim.groups[group].rule, parameters[parameter], grown, optim):.6g}")
        members[parameter] = name = group if factor == 1 else f"{group}*{factor:g}"
        parts.setdefault(group, {})[name] = factor
    groups = {
        name: _part(optim.groups[group], factor, optim)
        for group, factors in parts.items()
        for name, factor in sorted(factors.items(), key=lambda item: -item[1])
    }
    smaller = {
        name: replace(getattr(optim, name), eps=getattr(optim, name).eps / grown["width"])
        for name in ("m3", "delta_momentum")
    }
    return members, replace(optim, groups=groups, eps=optim.eps / grown["width"], **smaller)


def rate_factor(rule: str, parameter: ParameterSizes, grown: Mapping[Size, float], optim: OptimConfig) -> float:
    """Return the factor on a parameter's learning rate.

    An update is to move what a parameter answers as far as at the base width. The most it moves a linear map's answers
    is its spectral norm, which is to stay; the factor divides by how that norm grows at a fixed rate. `grown` is what
    `growth` returns.
    """
    factors = [grown[size] for size in parameter.sizes]
    if rule == "adamw" or (rule == "delta_momentum" and optim.delta_momentum.beta2 is not None):
        return math.prod(factors) ** -0.5
    if rule == "delta_momentum":
        return 1.0 if "width" in parameter.sizes else grown["width"] / grown["head"]
    rows, columns = parameter.shape[-2:]
    base = _orthogonal_norm(rule, rows / factors[0], columns / factors[1], optim)
    return base / _orthogonal_norm(rule, rows, columns, optim)


def _orthogonal_norm(rule: str, rows: float, columns: float, optim: OptimConfig) -> float:
    """Return the spectral norm of an orthogonalised update at rate 1, up to a constant."""
    adjust = optim.muon.adjust_lr_fn if rule == "muon" else optim.m3.adjust_lr_fn
    if adjust is not None:
        return adjusted_lr(1.0, adjust, (rows, columns))
    return 1.0 if optim.m3.form == "paper" else math.sqrt(max(rows, columns))


def _part(group: GroupConfig, factor: float, optim: OptimConfig) -> GroupConfig:
    decay = optim.weight_decay if group.weight_decay is None else group.weight_decay
    return group if factor == 1 else replace(group, lr_scale=group.lr_scale * factor, weight_decay=decay / factor)


def _misfits(
    assigned: Mapping[str, str], parameters: Mapping[str, ParameterSizes], groups: Mapping[str, GroupConfig]
) -> Iterator[Problem]:
    """Find parameters that orthogonal updates and momenta do not cover: embedding, head, gates, convolutions."""
    for parameter, name in assigned.items():
        rule, sizes = groups[name].rule, parameters[parameter].sizes
        if rule != "adamw" and len(sizes) != 2:
            message = f"{rule} has no rate that holds at every width for {parameter}, which is no linear map"
            hint = "give it to a group with rule: adamw, or leave model.transfer out"
            yield Problem(f"optim.groups.{name}.rule", message, hint=hint)
