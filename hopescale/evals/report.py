"""Results, as a table for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hopescale.common.disk import write_synced
from hopescale.common.errors import CheckpointError
from hopescale.evals.suite_result import PositionResult, SuiteResult, columns, position_table, suite_table
from hopescale.infer.load import LoadedModel

_TITLES = ("task", "version", "shots", "samples", "metric", "value", "stderr")


@dataclass(frozen=True)
class TaskResult:
    """Result of one task, or of a group of them."""

    name: str
    version: str
    shots: int | None
    """Solved examples before each question; None where there are none to give."""
    samples: int | None
    """Questions, or sequences; None for a group."""
    metrics: dict[str, float]
    """By `metric` or `metric,filter`."""
    stderr: dict[str, float]
    """Standard errors, by the same names, as far as they are known."""


@dataclass(frozen=True)
class Measurements:
    """All that was measured of a model."""

    tasks: Sequence[TaskResult] = ()
    suites: Sequence[SuiteResult] = ()
    positions: Sequence[PositionResult] = ()

    def tables(self) -> Iterator[str]:
        """Write everything in columns."""
        if self.tasks:
            yield from table(self.tasks)
        if self.suites:
            yield from suite_table(self.suites)
        if self.positions:
            yield from position_table(self.positions)


def table(results: Sequence[TaskResult]) -> Iterator[str]:
    """Write results in columns, a metric a line."""
    rows = [_TITLES]
    for result in results:
        shown = [result.name, result.version, _count(result.shots), _count(result.samples)]
        for metric, value in result.metrics.items():
            error = result.stderr.get(metric)
            rows.append((*shown, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
            shown = [""] * len(shown)
    yield from columns(rows)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def report(loaded: LoadedModel, measured: Measurements, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put results together with the model they were measured on and the other settings that they depend on."""
    results = measured.tasks
    packages = [name for name in ("hopescale", "torch", "lm_eval") if find_spec(name)]
    return {
        "model": str(loaded.folder),
        "step": loaded.manifest.step,
        "tokens_seen": loaded.manifest.progress["tokens_seen"],
        "weights": loaded.digest,
        "settings": dict(settings),
        "results": {result.name: {k: v for k, v in asdict(result).items() if k != "name"} for result in results},
        "suites": [asdict(result) for result in measured.suites],
        "positions": [asdict(result) for result in measured.positions],
        "versions": {name: version(name) for name in packages},
        "config": loaded.manifest.config,
    }


def report_path(loaded: LoadedModel) -> Path | None:
    """Return a new file in `evals/` of the run whose checkpoint it is; None if it is not in a run."""
    if loaded.folder.parent.name != "checkpoints":
        return None
    folder, number = loaded.folder.parents[1] / "evals", 1
    while (file := folder / f"{loaded.folder.name}.{number}.json").exists():
        number += 1
    return file


def write_report(file: Path, body: Mapping[str, Any]) -> None:
    """Write a report whole, or not at all.

    Raises:
        CheckpointError: If the disk is full or not writable.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_synced(partial, (json.dumps(body, indent=1) + "\n").encode())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {file}: {error.strerror}", "choose another file: --out") from error
