"""Steps that a device has been given, and what the host learns of them."""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.engine import Computed, Gradients
from hopescale.optim.changes import WeightChanges


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device has been given.

    Attributes:
        step: Number of the step.
        computed: Loss and norms.
        changes: Changes of levels by its update, which changes nothing if the step is bad; None if the update waits
            until the step is known to be good.
        is_recorded: Whether `log.every` names it.
    """

    step: int
    computed: Computed
    changes: WeightChanges | None
    is_recorded: bool


@dataclass(frozen=True)
class KnownStep:
    """What the host knows of a step.

    Attributes:
        gradients: Loss and norms; without those of levels after a bad step.
        changes: Changes of levels.
        problem: Fault of the step; None for a good one.
    """

    gradients: Gradients
    changes: dict[str, float]
    problem: str | None
