"""A sweep of trials that take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hopescale.sweep.progress import trial_folder, trial_status
from hopescale.sweep.trial import Trial
from tests.support.tiny import TINY

THREE_TRIALS = "name: toy\nrecipe: debug\naxes: {train.steps: [3, 4, 5]}\n"
"""A sweep's file."""


def toy_sweep(steps: Sequence[int], *extra: str) -> str:
    """Return a sweep's file: a model of almost nothing, one trial per number of steps.

    Args:
        steps: Optimizer steps of each trial.
        extra: Further lines of what is set for all trials, as `checkpoint.every: 10`.
    """
    settings = (*(setting.replace("=", ": ") for setting in TINY), "train.validation.tokens: 64", *extra)
    lines = ["name: toy", "recipe: debug", "set:", *(f"  {line}" for line in settings)]
    return "\n".join([*lines, "axes:", f"  train.steps: {list(steps)}"]) + "\n"


def states(trials: Sequence[Trial], folder: Path) -> list[str]:
    """Return the state of each trial of the sweep in `out` of a folder."""
    return [trial_status(trial_folder(folder / "out", trial)).state for trial in trials]


def calls(folder: Path) -> list[str]:
    """Return the trials there that the program in place of training was started for, in order."""
    return (folder / "out/trials/calls").read_text().split()
