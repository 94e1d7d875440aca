"""A table of runs as a fit sees it: parameters, tokens, FLOPs and loss of each, by series.

Knows nothing of where the runs came from: a sweep's `points.csv` and a table of somebody else's are read alike.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hopescale.common.errors import DataError
from hopescale.scaling.law import FLOPS_PER_PARAM_TOKEN, Cost
from hopescale.scaling.origins import named, origins

COLUMNS: dict[str, tuple[str, ...]] = {
    "N": ("n", "params", "parameters", "numparams", "numparameters", "modelsize", "size"),
    "D": ("d", "tokens", "numtokens", "trainingtokens", "traintokens", "tokensseen"),
    "FLOP": (
        "flop",
        "flops",
        "c",
        "compute",
        "trainingflop",
        "trainingflops",
        "trainflop",
        "trainflops",
        "computebudget",
    ),
    "loss": ("valloss", "validationloss", "evalloss", "testloss", "finalloss", "loss"),
    "series": ("series", "mixer", "optimizer", "architecture", "variant"),
    "state": ("state",),
    "lr": ("lr", "learningrate", "peaklr", "maxlr", "optimlr"),
    "batch": ("batch", "batchtokens", "globalbatchtokens", "batchsize", "globalbatchsize"),
    "rate_factor": ("ratefactor",),
}
"""Names a column may have, the first that is there is taken; case, spaces and punctuation do not count. A held-out
loss comes before one of training."""

SCORE = "score"
"""Column of the scores, where no other is named."""

FINISHED = ("", "done", "finished", "completed")
"""States of a run that has finished, as sweeps and trackers (Weights & Biases) call them; case does not count."""

MISSING = ("", "none", "null", "n/a", "na", "-")
"""Cells that hold nothing, as tools export them; case does not count."""

SAME = 0.005
"""Part by which the tokens of runs of one size may differ that count as one, where a table has rates or batches: steps
of another batch end at other tokens."""

LEAST_GROWTH = 0.05
"""Least power of the parameters with which the FLOPs of a token may rise over a table."""

Run = tuple[int, str, tuple[float, float, float, float]]
"""Row in the file, series, and N, D, FLOP and loss."""

ONE_SERIES = "all"
"""Name of the series of a table that tells none apart."""


@dataclass(frozen=True)
class Points:
    """Runs of one series, each column `[n]`."""

    params: np.ndarray
    """Parameters, as the table counts them."""
    tokens: np.ndarray
    flops: np.ndarray
    """Training FLOPs in all: those of the table, else `6 N D`."""
    loss: np.ndarray
    """Loss, nats per token."""
    rows: np.ndarray | None = None
    """Numbers of their rows in the table; None where they come from none."""
    weights: np.ndarray | None = None
    """Weight of each in fits of laws; None counts all alike."""

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, chosen: np.ndarray) -> Points:
        """Return the runs that a mask or an index array chooses."""
        return Points(*(None if column is None else column[chosen] for column in vars(self).values()))

    @property
    def counts(self) -> np.ndarray:
        """Weights, `[n]`: 1 each where none were given."""
        return np.ones(len(self)) if self.weights is None else self.weights

    def cost(self) -> Cost:
        """Return the cost of a token by size: least squares of logs over the runs.

        Raises:
            DataError: If a token costs no more in large models than in small ones, which no best size follows from.
        """
        per_param = np.log(self.flops / (self.params * self.tokens))
        sizes = np.log(self.params)
        growth, offset = np.polyfit(sizes - sizes.mean(), per_param, 1)
        if 1 + growth < LEAST_GROWTH:
            message = f"FLOP of a token goes with N^{1 + growth:.2f}, but must rise with the parameters"
            raise DataError(message, "FLOP is that of all of a run's training; leave the column out to have 6 N D")
        return Cost(float(np.exp(offset - growth * sizes.mean())), float(growth))


@dataclass(frozen=True)
class Table:
    """All that was read from a file."""

    series: dict[str, Points]
    """Runs of each series, in the order of the file."""
    left_out: list[str]
    """Lines about the runs that are not among them, and why."""
    source: Path
    header: list[str] = field(default_factory=list)
    """Names of the file's columns."""
    rows: list[tuple[int, list[str]]] = field(default_factory=list)
    """Rows of the file with their numbers, as they stand there."""
    finished: list[Run] = field(default_factory=list)
    """All runs that have finished, those that another of their size and tokens beats among them."""
    losses_of: dict[str, str] = field(default_factory=dict)
    """Text that the losses of a series are of (`val/main`), or `train`; nothing where the file does not say it."""

    def has(self, meaning: str) -> bool:
        """Tell whether there is a column of a meaning of `COLUMNS`."""
        return meaning in places_of(self.header)

    def column(self, meaning: str) -> dict[int, float]:
        """Return the numbers of a column by row, for the rows that hold one.

        Raises:
            DataError: If there is no such column, or a cell of it is not a number above 0.
        """
        place = places_of(self.header).get(meaning)
        if place is None:
            message = f"{self.source} has no column for {meaning}, only {', '.join(self.header)}"
            raise DataError(message, f"names that are known: {', '.join(COLUMNS[meaning])}")
        found = self._numbers(place)
        for number, value in found.items():
            if not 0 < value < math.inf:
                raise DataError(f"{self._cell(number, place)}: {value:g}, but must be above 0 and finite")
        return found

    def went_back(self) -> set[int]:
        """Return the rows of runs that went back to a lower rate, so that they are not runs of the rate they name."""
        has = self.has("rate_factor")
        return {row for row, factor in self.column("rate_factor").items() if factor != 1} if has else set()

    def scores(self, column: str | None = None) -> dict[int, float]:
        """Return the numbers of a column of scores by row, for the rows that hold one; None names `score`.

        Raises:
            DataError: If there is no such column, a cell of it is not a number from 0 to 1, or runs were asked other
                questions than others.
        """
        name = SCORE if column is None else column
        if name not in self.header:
            raise DataError(f"{self.source} has no column {name!r}, only {', '.join(self.header)}")
        place = self.header.index(name)
        found = self._numbers(place)
        for number, value in found.items():
            if not 0 <= value <= 1:
                hint = "divide by 100 what is in per cent"
                raise DataError(f"{self._cell(number, place)}: {value:g}, but a score is from 0 to 1", hint)
        if len(asked := origins(name, self.header, self.rows, found)) > 1:
            hint = "ask all runs the same: hopescale eval SWEEP-FOLDER --suite ..., then collect again"
            raise DataError(f"{self.source}: column {name} holds {named(asked)}, which do not compare", hint)
        return found

    def _numbers(self, place: int) -> dict[int, float]:
        held = ((number, row[place]) for number, row in self.rows if _holds(row[place]))
        return {number: _number(cell, self.header[place], f"{self.source}, row {number}") for number, cell in held}

    def _cell(self, number: int, place: int) -> str:
        return f"{self.source}, row {number}, column {self.header[place]}"


def read_points(
    path: Path, series_column: str | None = None, drop_highest: int = 0, loss_column: str | None = None
) -> Table:
    """Read a table of runs: comma, semicolon or tab separated under a row of names, or a JSON array of objects.

    It needs `loss` and two of N, D and FLOP; what is missing of the three follows from `FLOP = 6 N D`. Runs that
    diverged or have not finished, by their `state` or by a loss that is no finite number, are left out and named, as
    are all but the best of several runs of one size on as many tokens.

    Args:
        path: File of the table.
        series_column: Column that tells series apart, where it is none of `COLUMNS`.
        drop_highest: Number of runs of the highest losses to leave out, over all series.
        loss_column: Column of the loss, where it is not the first of `COLUMNS` that is there.

    Raises:
        DataError: If the file cannot be read, lacks a column, a cell is not what it must be (row and column named), or
            a series has losses of several texts.
    """
    rows, header = _read_rows(path)
    columns = _find_columns(header, {"series": series_column, "loss": loss_column}, path)
    kept: list[Run] = []
    left_out: list[str] = []
    for number, row in rows:
        run = _read_run(row, columns, f"{path}, row {number}")
        if isinstance(run, str):
            left_out.append(f"row {number}: {run}")
        else:
            kept.append((number, row[columns["series"]].strip() if "series" in columns else ONE_SERIES, run))
    finished = list(kept)
    kept, others = _best_of_each(kept, SAME if {"lr", "batch"} & columns.keys() else 0.0)
    left_out += others
    highest = sorted(kept, key=lambda item: -item[2][3])[:drop_highest]
    left_out += [f"row {number}: loss {run[3]:.4g} is among the highest {drop_highest}" for number, _, run in highest]
    kept = [item for item in kept if item not in highest]
    if not kept:
        raise DataError(f"{path} holds no finished run ({len(left_out)} left out)", left_out[0] if left_out else None)
    names = dict.fromkeys(name for _, name, _ in kept)
    series = {name: _points([item for item in kept if item[1] == name]) for name in names}
    table = Table(series, left_out, path, header, rows, finished)
    return replace(table, losses_of=_losses_of(table, header[columns["loss"]]))


def _losses_of(table: Table, column: str) -> dict[str, str]:
    """Return of which text the losses of each series are, where the table says it; there is no law of several."""
    found = {}
    for name in dict.fromkeys(series for _, series, _ in table.finished):
        own = {number for number, series, _ in table.finished if series == name}
        texts = origins(column, table.header, table.rows, own)
        if len(texts) > 1:
            hint = "keep the rows of one, or tell them apart by a column: --series COLUMN"
            raise DataError(f"{table.source}, series {name}: column {column} holds losses of {named(texts)}", hint)
        if texts:
            found[name] = next(iter(texts))
    return found


def _points(kept: list[Run]) -> Points:
    return Points(*np.array([run for _, _, run in kept]).T, rows=np.array([number for number, _, _ in kept]))


def _read_rows(path: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Return the rows that are not empty with their numbers in the file, and the names of the columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}", "give a table with columns N, D or FLOP, and loss") from error
    if text.lstrip()[:1] == "[":
        return _read_records(text, path)
    lines = text.splitlines()
    if not lines:
        raise DataError(f"{path} is empty", "give a table with columns N, D or FLOP, and loss")
    reader = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count))
    try:
        header = next(reader)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}, row {reader.line_num}: {error}", "look for a quote that is never closed") from error
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: {len(row)} cells, but the first row names {len(header)} columns")
    return rows, header


def _read_records(text: str, path: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Return a JSON array of objects as rows and names of columns; a missing value is empty."""
    try:
        records = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", "give a table, or a JSON array of objects") from error
    if odd := [number for number, record in enumerate(records, 1) if not isinstance(record, dict)]:
        raise DataError(f"{path}, record {odd[0]}: no object", 'each run must be an object: {"N": ..., "loss": ...}')
    header = list(dict.fromkeys(name for record in records for name in record))
    cells = [["" if (cell := record.get(name)) is None else str(cell) for name in header] for record in records]
    return list(enumerate(cells, 1)), header


def places_of(header: list[str]) -> dict[str, int]:
    """Return where each meaning of `COLUMNS` is among the names of columns, for those that are there."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in header]
    return {
        meaning: plain.index(next(name for name in names if name in plain))
        for meaning, names in COLUMNS.items()
        if set(names) & set(plain)
    }


def _find_columns(header: list[str], named: Mapping[str, str | None], path: Path) -> dict[str, int]:
    """Return where each meaning of `COLUMNS` is, for those that the table has."""
    places = places_of(header)
    for meaning, column in named.items():
        if column is not None:
            if column not in header:
                raise DataError(f"{path} has no column {column!r}, only {', '.join(header)}")
            places[meaning] = header.index(column)
    if "loss" not in places or len({"N", "D", "FLOP"} & set(places)) < 2:
        lacking = "loss" if "loss" not in places else "two of N, D and FLOP"
        raise DataError(
            f"{path} has no column for {lacking}, only {', '.join(header)}",
            "; ".join(
                f"{meaning}: {', '.join(names[:5])}"
                for meaning, names in COLUMNS.items()
                if meaning in ("N", "D", "FLOP", "loss")
            ),
        )
    return places


def _read_run(row: list[str], columns: dict[str, int], place: str) -> tuple[float, float, float, float] | str:
    """Return N, D, FLOP and loss of a row, or why it is left out."""
    state = row[columns["state"]].strip() if "state" in columns else ""
    if state.lower() not in FINISHED:
        return state
    loss = _number(row[columns["loss"]], "loss", place) if _holds(row[columns["loss"]]) else None
    if loss is None or not math.isfinite(loss):
        return "no loss" if loss is None else f"loss is {loss}"
    there = [name for name in ("N", "D", "FLOP") if name in columns]
    if lacking := [name for name in there if not _holds(row[columns[name]])]:
        return f"no {lacking[0]}"
    values = {name: _number(row[columns[name]], name, place) for name in there}
    for name, value in {**values, "loss": loss}.items():
        if not 0 < value < math.inf:
            raise DataError(f"{place}, column {name}: {value:g}, but must be above 0 and finite")
    flops = values.get("FLOP") or FLOPS_PER_PARAM_TOKEN * values["N"] * values["D"]
    params = values.get("N") or flops / (FLOPS_PER_PARAM_TOKEN * values["D"])
    tokens = values.get("D") or flops / (FLOPS_PER_PARAM_TOKEN * values["N"])
    return params, tokens, flops, loss


def _holds(cell: str) -> bool:
    return cell.strip().lower() not in MISSING


def _number(text: str, column: str, place: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{place}, column {column}: {text.strip()!r} is not a number") from None


def _best_of_each(kept: list[Run], within: float) -> tuple[list[Run], list[str]]:
    """Keep the run of the lowest loss of those of one series with the same N and, within a part, D; name the others."""
    best: dict[tuple[object, ...], Run] = {}
    key_of = _groups(kept, within)
    for item, key in zip(kept, key_of, strict=True):
        if key not in best or item[2][3] < best[key][2][3]:
            best[key] = item
    chosen = [item for item, key in zip(kept, key_of, strict=True) if best[key] is item]
    others = [
        f"row {item[0]}: loss {item[2][3]:.4g}, but row {best[key][0]} is the best of its size and tokens"
        for item, key in zip(kept, key_of, strict=True)
        if best[key] is not item
    ]
    return chosen, others


def _groups(kept: list[Run], within: float) -> list[tuple[object, ...]]:
    """Return a key for each run, which runs share of one series, size and cost of a token, and as many tokens."""
    sizes = [
        (series, params, round(math.log(flops / (params * tokens)), 2))
        for _, series, (params, tokens, flops, _) in kept
    ]
    keys: list[tuple[object, ...]] = [()] * len(kept)
    for size in set(sizes):
        own = [place for place, other in enumerate(sizes) if other == size]
        for place, rank in zip(own, ranks([kept[place][2][1] for place in own], within).tolist(), strict=True):
            keys[place] = (*size, rank)
    return keys


def ranks(values: Sequence[float] | np.ndarray, within: float = SAME) -> np.ndarray:
    """Number values from the least on, `[n]`; those within a part of the one before have the same number."""
    order = np.argsort(values)
    found = np.zeros(len(values), dtype=int)
    found[order[1:]] = np.cumsum(np.diff(np.log(np.asarray(values)[order])) > np.log1p(within))
    return found
