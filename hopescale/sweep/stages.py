"""Trunks and branches as stages of jobs: a trunk in parts, up to the steps at which others branch off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hopescale.observe.run_status import DIVERGED, DONE
from hopescale.sweep.branches import horizons
from hopescale.sweep.pool import train_words
from hopescale.sweep.progress import can_start, lost_with_trunk, status_in_sweep, trial_folder
from hopescale.sweep.trial import Trial

_OVER = (DONE, DIVERGED)
"""States in which nothing is left to train."""


@dataclass(frozen=True)
class Start:
    """A start of a trial, or of a part of it."""

    trial: Trial
    run_dir: Path
    words: tuple[str, ...]
    """Arguments of `hopescale`."""


def make_stages(trials: Sequence[Trial], folder: Path) -> list[tuple[dict[int, Start], int | None]]:
    """Return the parts of a sweep with branches that are still to be trained, as stages in their order.

    Args:
        trials: Trials of the sweep; those that share a run have one number.
        folder: Folder of the sweep.

    Returns:
        Starts by number, and the place of the stage of which the same number has to end first, None without one. Those
        that may begin now have no start of their number there.
    """
    stages: list[tuple[dict[int, Start], int | None]] = []
    groups = horizons(trials)
    before = None
    for place in range(max(map(len, groups))):
        trunks: dict[int, Start] = {}
        branches: dict[int, Start] = {}
        for number, group in enumerate(groups):
            trunk, trial = group[-1], group[place]
            if lost_with_trunk(trial, folder, ended=_OVER) is not None:
                continue
            if trial is trunk:
                if not _is_over(trunk, folder):
                    trunks[number] = _start(trunk, folder)
                continue
            if not _can_start(trial, folder):
                trunks[number] = _start(trunk, folder, "--stop-at", str(trial.branch.step))
            if not _is_over(trial, folder):
                branches[number] = _start(trial, folder)
        stages.append((trunks, before))
        before = len(stages) - 1
        if branches:
            stages.append((branches, before))
    return stages


def _start(trial: Trial, folder: Path, *words: str) -> Start:
    run_dir = trial_folder(folder, trial)
    return Start(trial, run_dir, (*train_words(trial, run_dir), *words))


def _can_start(trial: Trial, folder: Path) -> bool:
    return can_start(trial_folder(folder, trial), trial)


def _is_over(trial: Trial, folder: Path) -> bool:
    return status_in_sweep(trial, folder).state in _OVER
