"""Finished evaluations side by side: runs that differ in seeds alone are one system. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopescale.common.errors import DataError

EVALUATIONS = "evals"
"""Folder of a run that holds its evaluations."""
_SEEDS = (("train", "seed"), ("data", "seed"))
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t of a two-sided 95 % interval, by degrees of freedom from 1."""
Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    mean: float
    low: float | None
    """Lower end of the 95 % interval of the mean over seeds (Student's t); None with one seed."""
    high: float | None
    seeds: int
    stderr: float | None
    """Standard error over examples, if there is one seed."""


@dataclass(frozen=True)
class System:
    """What was trained, whatever its seed, and its step."""

    label: str
    step: int
    models: tuple[str, ...]
    trained_length: int
    """`train.seq_len`."""

    @property
    def title(self) -> str:
        """Name of a column."""
        return f"{self.label}, step {self.step:,}"


@dataclass(frozen=True)
class MeasuredPoint:
    """A point of a suite, measured on several systems."""

    suite: str
    settings: Settings
    chance: float | None
    best: float | None
    values: Mapping[str, Mapping[str, Spread]]
    """By title of the system, then by name of the measure, such as `accuracy`."""


@dataclass(frozen=True)
class Comparison:
    """Systems and what was measured of them."""

    systems: Sequence[System]
    suites: Sequence[MeasuredPoint]
    positions: Sequence[MeasuredPoint]
    """Loss by place: the settings are the text, the row's length, and the first and last place."""
    others: Sequence[MeasuredPoint]
    """Tasks of lm-eval and the held-out loss; the settings are the metric."""


def read_evaluations(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the JSON files of evaluations, those of a run folder in the order in which they were made.

    Raises:
        DataError: If there are none, or one is no evaluation.
    """
    found = []
    for path in paths:
        files = [path]
        if path.is_dir():
            files = sorted((path / EVALUATIONS).glob("*.json"), key=_made)
            if not files:
                hint = "hopescale eval writes there; or name its JSON file"
                raise DataError(f"no evaluations in {path / EVALUATIONS}", hint)
        found += [_read(file) for file in files]
    return found


def _made(file: Path) -> tuple[str, int]:
    """Return the step and the number of `step-00000600.2.json`."""
    name, _, number = file.stem.rpartition(".")
    return name, int(number) if number.isdecimal() else 0


def _read(file: Path) -> dict[str, Any]:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read the evaluation {file}: {reason}", "name a JSON file of hopescale eval") from error
    if not isinstance(body, dict) or not {"model", "step", "config", "results"} <= body.keys():
        hint = "name a JSON file of hopescale eval, or a run folder"
        raise DataError(f"{file} is no evaluation: it lacks model, step, config or results", hint)
    return body


def compare(bodies: Sequence[Mapping[str, Any]]) -> Comparison:
    """Put evaluations side by side. Of a model that was asked the same twice, the later answers count."""
    systems = _systems(bodies)
    title_of = {model: system.title for system in systems for model in system.models}
    places = ("accuracy", "exact", "last", "loss")
    suites, positions, others = {}, {}, {}
    for body in bodies:
        title, model = title_of[_model(body)], _model(body)
        for one in body.get("suites", ()):
            numbers = {name: (one[name], one["stderr"] if name == "accuracy" else None) for name in places}
            key = (one["task"], tuple(one["settings"].items()))
            _note(suites, key, title, model, numbers, one["chance"], one["best"])
        for one in body.get("positions", ()):
            for low, high, loss in one["places"]:
                key = (one["name"], (("length", one["length"]), ("first", low), ("last", high)))
                _note(positions, key, title, model, {"loss": (loss, None)})
        for task, one in body["results"].items():
            for metric, value in one["metrics"].items():
                key = (task, (("metric", metric),))
                _note(others, key, title, model, {"value": (value, one["stderr"].get(metric))})
    return Comparison(systems, *(tuple(_measured(found)) for found in (suites, positions, others)))


def _model(body: Mapping[str, Any]) -> str:
    return f"{body['model']} at step {body['step']}"


def _systems(bodies: Sequence[Mapping[str, Any]]) -> list[System]:
    """Group models whose configs differ in name and seeds alone; a name that two groups share gets a number."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for body in bodies:
        groups.setdefault((_identity(body["config"]), body["step"]), []).append(body)
    identities = list(dict.fromkeys(identity for identity, _ in groups))
    labels: dict[str, str] = {}
    for identity in identities:
        first = next(group[0] for (own, _), group in groups.items() if own == identity)
        name = first["config"].get("name", "run")
        number = 1 + sum(label.partition(" #")[0] == name for label in labels.values())
        labels[identity] = name if number == 1 else f"{name} #{number}"
    return [
        System(labels[identity], step, tuple(dict.fromkeys(map(_model, group))), group[0]["config"]["train"]["seq_len"])
        for (identity, step), group in groups.items()
    ]


def _identity(config: Mapping[str, Any]) -> str:
    """Return what a config is but for its name and its seeds."""
    rest = {name: dict(part) if isinstance(part, dict) else part for name, part in config.items() if name != "name"}
    for section, key in _SEEDS:
        rest.get(section, {}).pop(key, None)
    return json.dumps(rest, sort_keys=True)


def _note(found: dict, key: tuple, title: str, model: str, numbers: dict, *limits: float | None) -> None:
    point = found.setdefault(key, ([], {}))
    point[0].append(limits or (None, None))
    point[1].setdefault(title, {})[model] = numbers


def _measured(found: Mapping[tuple, tuple]) -> Iterator[MeasuredPoint]:
    for (suite, settings), (limits, by_title) in found.items():
        values = {title: dict(_spreads(list(models.values()))) for title, models in by_title.items()}
        yield MeasuredPoint(suite, settings, *limits[-1], values)


def _spreads(models: Sequence[Mapping[str, tuple[float, float | None]]]) -> Iterator[tuple[str, Spread]]:
    for name in models[0]:
        yield name, spread([one[name][0] for one in models], models[0][name][1])


def spread(values: Sequence[float], stderr: float | None) -> Spread:
    """Return mean and interval of one number per seed; the standard error counts only where there is one seed."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Spread(mean, None, None, 1, stderr)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = (_T[count - 2] if count - 2 < len(_T) else 1.96) * deviation / math.sqrt(count)
    return Spread(mean, mean - half, mean + half, count, None)
