"""How the weights change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step; `optim.lr` is its peak."""

    name: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: warm-up, then half a cosine. `wsd`: warm-up, stable, then a linear decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0. A run that is shorter ends within it."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Fraction of `train.steps` spent in the final decay. Only with `name: wsd`."""


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that share settings. Every parameter belongs to exactly one group."""

    match: tuple[str, ...] | None = None
    """Shell patterns of parameter names (`*.norm.weight`). Null takes all that no other group matches; exactly one
    group does so."""
    lr_scale: float = 1.0
    """Factor on `optim.lr`."""
    weight_decay: float | None = None
    """Decoupled weight decay per unit of learning rate; null is `optim.weight_decay`."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments; null is `optim.betas`."""


@dataclass(frozen=True)
class OptimConfig:
    """The outer optimizer."""

    name: Literal["adamw"] = "adamw"
    """The update rule."""
    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay per unit of learning rate."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm; null is no limit. A level that is due counts with the mean over its period."""
    accumulate: Literal["sum", "mean"] = "sum"
    """What a level is updated with at the end of its period: the sum of the gradients since the last update, or their
    mean per step."""
    groups: dict[str, GroupConfig | None] = field(
        default_factory=lambda: {
            "no_decay": GroupConfig(
                match=("*norm.weight", "*.mixer.gates.*", "*.mixer.conv.*", "*.cms.mix"),
                weight_decay=0.0,
            ),
            "decay": GroupConfig(),
        }
    )
    """Parameter groups by name; `null` removes one. A parameter matched twice or not at all is an error."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
