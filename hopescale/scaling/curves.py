"""Losses over the course of a sweep's trials, as its run folders have recorded them."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hopescale.observe.metrics import read_metrics
from hopescale.scaling.points import ONE_SERIES

_PARTS = 60


@dataclass(frozen=True)
class Curve:
    """Training loss of one trial."""

    series: str
    params: float
    """Parameters, as the table counts them."""
    flops: np.ndarray
    """FLOPs spent, `[m]`."""
    loss: np.ndarray
    """Mean loss of the records around, nats per token, `[m]`."""


def read_curves(table: Path) -> list[Curve]:
    """Read the curves of the trials that a sweep's `points.csv` lists, from the folders beside it.

    The curve of a branch begins with what its trunk has recorded. A curve is cut into up to 60 parts, even by ratio of
    tokens, and each gives its mean: single batches are noisy. A table without the columns trial, N, D and FLOP has no
    curves.

    Raises:
        DataError: If a record is damaged.
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"trial", "N", "D", "FLOP"} <= set(rows[0]):
        return []
    curves = []
    for row in rows:
        records = _records(table, row["trial"])
        if row.get("trunk") and records:
            shared = int(row["branch_step"])
            records = [record for record in _records(table, row["trunk"]) if record["step"] <= shared] + records
        pairs = [(record["tokens_seen"], record["loss"]) for record in records if record.get("loss") is not None]
        if len(pairs) > 1:
            tokens, losses = _means(*np.array(pairs, dtype=float).T)
            flops = tokens * float(row["FLOP"]) / float(row["D"])
            curves.append(Curve(row.get("series") or ONE_SERIES, float(row["N"]), flops, losses))
    return curves


def _records(table: Path, trial: str) -> list[dict[str, Any]]:
    """Return the records of a trial, none if it has not begun."""
    path = table.parent / "trials" / trial / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def _means(tokens: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of tokens and losses over parts that are even by ratio, leaving out empty ones."""
    part = np.digitize(tokens, np.geomspace(tokens[0], tokens[-1] * (1 + 1e-9), min(_PARTS, len(tokens)) + 1))
    return tuple(np.array([values[part == number].mean() for number in np.unique(part)]) for values in (tokens, losses))
