"""What an update of a parameter costs by its rule: operations, and the state that it keeps. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hopescale.config.schema import DeepMomentumConfig, OptimConfig

ENTRY_COST = 64
"""FLOPs that take as long as reading and writing an entry of weight, gradient and state: its part of an update that no
matrix product is part of."""
DEEP_MEMORY_DIM = 32
"""Hidden width of deep momentum's MLP memory that is given none."""


def update_cost(rule: str, shape: Sequence[int], config: OptimConfig) -> float:
    """Return what an update of a parameter `[..., R, C]` costs, in FLOPs.

    Args:
        rule: Name of a rule for matrices.
        shape: Of the parameter.
        config: Settings of all rules.
    """
    return update_flops(rule, shape, config) + ENTRY_COST * math.prod(shape)


def update_flops(rule: str, shape: Sequence[int], config: OptimConfig) -> float:
    """Return the FLOPs of matrix products in an update of a parameter `[..., R, C]`; none with AdamW."""
    if rule == "adamw":
        return 0
    *heads, rows, columns = shape
    if rule == "delta_momentum":
        flops = 4 * rows * columns * min(rows, columns)
    elif rule == "deep_momentum":
        linear = config.deep_momentum.memory == "linear"
        width = columns if linear else deep_memory_dim(config.deep_momentum)
        flops = (6 if linear else 14) * rows * columns * width
    elif rule == "dgd":
        flops = columns**3 / 3 + 2 * rows * columns * columns
    else:
        short = min(rows, columns)
        flops = config.muon.ns_steps if rule == "muon" else config.m3.ns_steps
        flops *= short * short * (4 * max(rows, columns) + 2 * short)
        if rule == "m3" and config.m3.alpha_slow:
            flops *= 1 + 1 / config.m3.frequency
    return math.prod(heads) * flops


def deep_memory_dim(settings: DeepMomentumConfig) -> int:
    """Return the hidden width of deep momentum's MLP memory."""
    return settings.memory_dim or DEEP_MEMORY_DIM


def state_entries(rule: str, shape: Sequence[int], config: OptimConfig) -> int:
    """Count the float32 entries of a rule's state for a parameter, counters left out.

    Args:
        rule: Name of a rule.
        shape: Of the parameter, `[..., R, C]` for a rule for matrices.
        config: Settings of all rules.
    """
    entries = math.prod(shape)
    if rule == "adamw":
        return 2 * entries
    if rule == "m3":
        return entries * (1 + 2 * bool(config.m3.alpha_slow) + config.m3.second_moment)
    if rule == "delta_momentum":
        return entries * (1 if config.delta_momentum.beta2 is None else 2)
    if rule == "deep_momentum":
        *heads, _, columns = shape
        linear = config.deep_momentum.memory == "linear"
        width = columns if linear else 2 * deep_memory_dim(config.deep_momentum)
        return math.prod(heads) * columns * width
    return 0 if rule == "dgd" else entries
