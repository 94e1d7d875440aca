"""Trials under the names that they began with, although the sweep's file has changed and would name them otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hopescale.common.errors import HopescaleError
from hopescale.config.load import load_resolved
from hopescale.config.record import CONFIG
from hopescale.config.schema import RunConfig
from hopescale.config.show import diff
from hopescale.sweep.progress import is_same_data, trial_folder
from hopescale.sweep.trial import Trial

_COMPARED_FIRST = ("train", "optim", "model")
"""Parts of a config in which most trials differ."""


def under_old_names(trials: Sequence[Trial], folder: Path) -> tuple[list[Trial], dict[str, str]]:
    """Let trials that have not begun under their names go on in folders of no other trial that have their configs.

    A name has the values by which a trial differs from the others, so that another series, or another axis, changes it.

    Args:
        trials: Trials of a sweep, as its file names them.
        folder: Folder of the sweep; need not exist.

    Returns:
        The trials in the same order, and the names of those that go on otherwise: the new one to the old one.
    """
    begun = _strays(trials, folder)
    names: dict[str, str] = {}
    for moved in (False, True):  # a data set that lies elsewhere now is looked for after all that lie where they did
        for trial in trials if begun else ():
            if trial.name not in names and not (trial_folder(folder, trial) / CONFIG).exists():
                old = next((name for name, config in begun.items() if _is_of(trial, config, moved=moved)), None)
                if old is not None:
                    names[trial.name] = old
                    del begun[old]
    return [_renamed(trial, names) for trial in trials], names


def left_over(trials: Sequence[Trial], folder: Path) -> list[str]:
    """Return the names of trials that have begun in a sweep's folder and are none of these."""
    return [path.name for path in folders_of_others(trials, folder, CONFIG)]


def folders_of_others(trials: Sequence[Trial], folder: Path, file: str) -> list[Path]:
    """Return the trials' folders in that of a sweep that hold a file and belong to none of these trials."""
    known = {trial.name for trial in trials}
    return sorted(path.parent for path in folder.glob(f"trials/*/{file}") if path.parent.name not in known)


def _strays(trials: Sequence[Trial], folder: Path) -> dict[str, RunConfig]:
    found = {}
    for name in left_over(trials, folder):
        with suppress(HopescaleError):  # a config that cannot be read is that of no trial
            found[name] = load_resolved(folder / "trials" / name / CONFIG)
    return found


def _is_of(trial: Trial, begun: RunConfig, *, moved: bool) -> bool:
    """Tell whether a run is that of a trial, but for its name; with `moved` also if its text lies here twice."""
    if any(getattr(begun, part) != getattr(trial.config, part) for part in _COMPARED_FIRST):
        return False
    return all(
        change[0] == "name" or (moved and is_same_data(change, seen=True)) for change in diff(begun, trial.config)
    )


def _renamed(trial: Trial, names: Mapping[str, str]) -> Trial:
    """Return a trial with its old name, and with those of the trials that it depends on."""
    branch, choice = trial.branch, trial.choice
    if branch is not None:
        branch = replace(branch, trunk=names.get(branch.trunk, branch.trunk))
    if choice is not None:
        among = tuple(names.get(name, name) for name in choice.among)
        choice = replace(choice, among=among, twin=names.get(choice.twin, choice.twin))
    trial = replace(trial, branch=branch, choice=choice)
    if (old := names.get(trial.name)) is None:
        return trial
    overrides = tuple(f"name={old}" if each == f"name={trial.name}" else each for each in trial.overrides)
    return replace(trial, name=old, config=replace(trial.config, name=old), overrides=overrides)
