"""A sweep of trials that take seconds."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.tiny import TINY


def toy_sweep(steps: Sequence[int], *extra: str) -> str:
    """Return a sweep's file: a model of almost nothing, one trial per number of steps.

    Args:
        steps: Optimizer steps of each trial.
        extra: Further lines of what is set for all trials, as `checkpoint.every: 10`.
    """
    settings = (*(setting.replace("=", ": ") for setting in TINY), "train.validation.tokens: 64", *extra)
    lines = ["name: toy", "recipe: debug", "set:", *(f"  {line}" for line in settings)]
    return "\n".join([*lines, "axes:", f"  train.steps: {list(steps)}"]) + "\n"
