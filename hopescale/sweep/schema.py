"""The keys of SWEEP.yaml. Every field has its docstring beneath it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SeriesConfig:
    """Trials that belong to one curve: an architecture, an optimizer."""

    recipe: str | None = None
    """A recipe: a path from the sweep's file, or the name of a shipped one. Null is the sweep's `recipe`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key, for the trials of this series."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key as expressions, for the trials of this series."""


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: its trials are all combinations of series, sizes, horizons (`flops` or `tokens`) and axes."""

    name: str = "sweep"
    """Name of the sweep; its folder is `sweeps/<name>` unless `--sweep-dir` says otherwise."""
    recipe: str | None = None
    """Recipe of every series that names none."""
    series: dict[str, SeriesConfig] = field(default_factory=dict)
    """Series by name; none is one series, called after the recipe."""
    set: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key, for all trials."""
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sizes by name: what each sets, by dotted key."""
    flops: tuple[float, ...] = ()
    """Training FLOPs of a trial, in all: with `sizes`, an isoFLOP design. Decides `train.steps`."""
    tokens: tuple[Any, ...] = ()
    """Training tokens of a trial: counts, or expressions as in `20 * N`. Decides `train.steps`. Either this or
    `flops`; without both the steps are the recipe's."""
    branch: bool = False
    """Whether the horizons of a size are one run (WSD-S): the longest is trained whole, and each other one branches off
    where its decay begins. Needs `flops` or `tokens`, and `optim.schedule.name: wsd`."""
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Other keys to vary: values by dotted key, as in `optim.lr: [1e-3, 3e-3]`."""
    choose: str | None = None
    """Axis whose best value is chosen for each series, size and horizon, by the loss of the trials with the first value
    of every other axis; trials with its other values are left out from there on. Null trains all combinations."""
    rules: dict[str, Any] = field(default_factory=dict)
    """Values by dotted key as expressions, as in `optim.lr: 0.02 * d_model ** -0.5`."""
