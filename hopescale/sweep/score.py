"""The score of a trial: the mean accuracy of the newest evaluation of its last step by a suite."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

EVALUATIONS = "evals"
"""Folder of a run that holds its evaluations."""


@dataclass(frozen=True)
class Score:
    """What a trial has scored."""

    value: float
    """Mean accuracy over the points of the suite."""
    source: str
    """What was asked, in words that are equal for two trials if they were asked the same."""


def score(run_dir: Path, step: int) -> Score | None:
    """Return the score of a run at a step, by the newest evaluation; None if there is none."""
    for file in sorted((run_dir / EVALUATIONS).glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            if body["step"] == step and (asked := body["suites"]):
                return Score(sum(one["accuracy"] for one in asked) / len(asked), _source(body))
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            continue
    return None


def _source(body: Mapping[str, Any]) -> str:
    """Name the tasks and the number of their points, with a digest of all else that an answer depends on."""
    how = {name: value for name, value in body.get("settings", {}).items() if name in ("adapt", "levels")}
    points = [[one.get(name) for name in ("task", "settings", "examples")] for one in body["suites"]]
    digest = sha256(json.dumps([points, how], sort_keys=True).encode()).hexdigest()[:6]
    tasks = " ".join(dict.fromkeys(str(task) for task, *_ in points))
    return f"{tasks}, {len(points)} point{'s' * (len(points) > 1)}{', ' * bool(how)}{' '.join(how)}, {digest}"
