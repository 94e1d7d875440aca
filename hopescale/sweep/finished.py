"""The trials of a sweep that an evaluation asks, or has asked, by the sweep's folder."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from hopescale.common.errors import DataError
from hopescale.observe.run_status import DONE
from hopescale.sweep.collect import NOT_CHOSEN, POINTS
from hopescale.sweep.score import EVALUATIONS


def expand(paths: Iterable[Path], *, evaluated: bool = False) -> list[Path]:
    """Put the run folders of a sweep in the place of its folder: trials that are done, and of a choice the chosen ones.

    Args:
        paths: Folders and files; folders of sweeps have a `points.csv`.
        evaluated: Whether trials without an evaluation are left out.

    Raises:
        DataError: If a sweep has no such trial, or its table cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        found += _trials(path, evaluated) if (path / POINTS).is_file() else [path]
    return found


def _trials(folder: Path, evaluated: bool) -> list[Path]:
    try:
        with (folder / POINTS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [row["trial"] for row in rows if row["state"] == DONE and row.get("chosen") != NOT_CHOSEN]
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        hint = "write it anew: hopescale sweep collect SWEEP.yaml"
        raise DataError(f"{folder / POINTS} is no table of a sweep: {error!r}", hint) from error
    trials = [folder / "trials" / name for name in names]
    if evaluated:
        trials = [trial for trial in trials if any((trial / EVALUATIONS).glob("*.json"))]
    if not trials:
        what = "is done and was asked something" if evaluated else "is done"
        raise DataError(f"no trial of {folder} {what}", f"hopescale sweep status {folder / 'sweep.yaml'} shows them")
    return trials
