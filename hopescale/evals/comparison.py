"""Finished evaluations side by side: runs that differ in seeds alone are one system. Imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
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
    """A trained system: a recipe at any seed, a step, and the levels that follow a text or have followed one."""

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
    """Systems and their measurements."""

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
    systems, names = _systems(bodies)
    title_of = {name: system.title for system in systems for name in system.models}
    places = ("accuracy", "exact", "last", "loss")
    suites, positions, others = {}, {}, {}
    for body in bodies:
        model = names[_key(body)]
        owner = (title_of[model], model)
        for one in body.get("suites", ()):
            numbers = {name: (one[name], one["stderr"] if name == "accuracy" else None) for name in places}
            extent = (("examples", one.get("examples")),)
            point = suites.setdefault((one["task"], tuple(one["settings"].items())), {}).setdefault(extent, _Asked())
            point.note(*owner, numbers, one["chance"], one["best"])
        for one in body.get("positions", ()):
            extent = (("rows", one.get("rows")),)
            for low, high, loss in one["places"]:
                key = (one["name"], (("length", one["length"]), ("first", low), ("last", high)))
                positions.setdefault(key, {}).setdefault(extent, _Asked()).note(*owner, {"loss": (loss, None)})
        for task, one in body["results"].items():
            extent = (("shots", one.get("shots")), ("samples", one.get("samples")))
            for metric, value in one["metrics"].items():
                point = others.setdefault((task, (("metric", metric),)), {}).setdefault(extent, _Asked())
                point.note(*owner, {"value": (value, one["stderr"].get(metric))})
    return Comparison(systems, *(tuple(_measured(found)) for found in (suites, positions, others)))


def _key(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return a key that tells models apart: the digest of the weights, for an old result its name, and the levels."""
    return body.get("weights") or _name(body), _levels(body)


def _levels(body: Mapping[str, Any]) -> str:
    """Say which levels had followed a text and which followed the evaluation; empty if all were as trained."""
    settings, said = body.get("settings", {}), []
    if (folder := settings.get("levels")) is not None:
        # Its weights follow, as a folder's levels may have read on between two evaluations.
        said.append(f"levels {folder} {body.get('weights', '')[:8]}".rstrip())
    if (adapt := settings.get("adapt")) is not None:
        paces = (f"{name} every {one['period']} at {one['rate']}" for name, one in adapt["levels"].items())
        said.append(" ".join(["adapt", *paces, *["nested"] * adapt["nested"]]))
    return "".join(f", {each}" for each in said)


def _name(body: Mapping[str, Any]) -> str:
    return f"{body['model']} at step {body['step']}"


def _names(bodies: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Name each model once, by `_key`; names that several have are followed by the beginning of the digest."""
    names: dict[tuple[str, str], str] = {}
    for body in bodies:
        names.setdefault(_key(body), _name(body) + _levels(body))
    counts = Counter(names.values())
    return {key: f"{name} ({key[0][:8]})" if counts[name] > 1 else name for key, name in names.items()}


def _systems(bodies: Sequence[Mapping[str, Any]]) -> tuple[list[System], dict[tuple[str, str], str]]:
    """Group models whose configs differ in name and seeds alone; a name that two groups share gets a number.

    A model belongs to the group of its first evaluation: its export has the same weights, and may have another name.
    Levels that follow a text, or have followed one, make a group of their own.

    Returns:
        Groups, and the name of each model by `_key`.
    """
    names, first = _names(bodies), {}
    for body in bodies:
        first.setdefault(_key(body), body)
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for body in first.values():
        groups.setdefault((_identity(body["config"]), body["step"], _levels(body)), []).append(body)
    labels: dict[str, str] = {}
    for identity, *_ in groups:
        if identity not in labels:
            same = [body for (other, *_), group in groups.items() if other == identity for body in group]
            name = _common_name([body["config"].get("name", "run") for body in same])
            number = 1 + sum(label.partition(" #")[0] == name for label in labels.values())
            labels[identity] = name if number == 1 else f"{name} #{number}"
    systems = []
    for (identity, step, levels), group in groups.items():
        models, length = tuple(names[_key(one)] for one in group), group[0]["config"]["train"]["seq_len"]
        systems.append(System(labels[identity] + levels, step, models, length))
    return systems, names


def _common_name(names: Sequence[str]) -> str:
    """Return the common beginning of names, in whole parts: `a-lr1` of `a-lr1-seed0` and `a-lr1-seed1`."""
    parts = zip(*(name.split("-") for name in names), strict=False)
    alike = [part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)]
    return "-".join(alike) or names[0]


def _identity(config: Mapping[str, Any]) -> str:
    """Return a config without its name and its seeds."""
    rest = {name: dict(part) if isinstance(part, dict) else part for name, part in config.items() if name != "name"}
    for section, key in _SEEDS:
        rest.get(section, {}).pop(key, None)
    return json.dumps(rest, sort_keys=True)


class _Asked:
    """Results of systems on one question, by title and model, with the scores of chance and the best."""

    def __init__(self) -> None:
        self.chance: float | None = None
        self.best: float | None = None
        self.by_title: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {}

    def note(
        self, title: str, model: str, numbers: dict, chance: float | None = None, best: float | None = None
    ) -> None:
        self.by_title.setdefault(title, {})[model] = numbers
        self.chance, self.best = chance, best


def _measured(found: Mapping[tuple, Mapping[Settings, _Asked]]) -> Iterator[MeasuredPoint]:
    """Put points together; one that was asked to several extents, as with `--limit`, is a point for each of them."""
    for (suite, settings), by_extent in found.items():
        for extent, point in by_extent.items():
            values = {title: dict(_spreads(list(models.values()))) for title, models in point.by_title.items()}
            own = settings if len(by_extent) == 1 else settings + extent
            yield MeasuredPoint(suite, own, point.chance, point.best, values)


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
