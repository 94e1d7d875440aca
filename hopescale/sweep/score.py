"""The score of a trial: the mean accuracy of its newest evaluation by a suite."""

from __future__ import annotations

import json
from pathlib import Path

EVALUATIONS = "evals"
"""Folder of a run that holds its evaluations."""


def score(run_dir: Path) -> float | None:
    """Return the mean accuracy over the points of a run's newest evaluation by a suite, None if there is none."""
    for file in sorted((run_dir / EVALUATIONS).glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            asked = json.loads(file.read_text(encoding="utf-8")).get("suites", ())
            if asked:
                return sum(one["accuracy"] for one in asked) / len(asked)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            continue
    return None
