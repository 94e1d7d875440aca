"""The best learning rate and batch of a series, from a small design: several rates at some sizes and horizons.

Near its best the log of the loss is a parabola in the logs of rate and batch, of one shape for the whole series, whose
bottom moves with size and tokens. All of it is one problem of least squares:

    log L = a(N, D) + p x^2 + x (q0 + qN n + qD d + s b) + r b^2 + b (u0 + uN n + uD d)

with `x`, `b`, `n` and `d` the logs of rate, batch, N and D about their means. The best rate is then a power law,
`lr(N, D, batch)`. Terms that the runs cannot tell are left out. The form is that of the Step law (Li et al., arXiv
2503.04715), with an exponent of the batch as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import format_count
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.points import Points, Table, ranks

NEAR = 0.1
"""Runs whose loss is a greater part than this above the best of their size and tokens are no longer on the parabola."""

UNDERTUNED = 0.01
"""Part of the loss that a rate may cost before its run is named as undertuned."""

FARTHEST = 2.0
"""Factor by which the best rates of all sizes may lie outside the rates that were run, as a parabola tells them."""

_DRAWS = 1000
_NAMES = {"n": "N", "d": "D", "b": "batch"}


@dataclass(frozen=True)
class TunedRuns:
    """Runs of one series with their rates, batches and sizes, each column `[n]`."""

    rows: np.ndarray
    """Numbers of the rows in the table."""
    params: np.ndarray
    tokens: np.ndarray
    batch: np.ndarray
    """Tokens a step, or whatever the table counts; 1 where it has no such column."""
    lr: np.ndarray
    loss: np.ndarray

    def take(self, chosen: np.ndarray) -> TunedRuns:
        """Return the runs of a mask."""
        return TunedRuns(**{name: column[chosen] for name, column in vars(self).items()})

    def groups(self) -> np.ndarray:
        """Return a number for each run that runs of the same size and tokens share, `[n]`."""
        keys = np.stack([ranks(self.params), ranks(self.tokens)], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel()


@dataclass(frozen=True)
class PowerRule:
    """`scale * N^.. * D^.. * batch^..`, with intervals of the exponents."""

    scale: float
    exponents: dict[str, float]
    """Exponents by `N`, `D` and `batch`; those that are not there could not be told, or were held at 0."""
    intervals: dict[str, Interval]
    spread: float
    """Half of the interval of the log of the value, in the middle of the runs."""

    def __call__(self, params: np.ndarray, tokens: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Return the best value for sizes, tokens and batches."""
        known = {"N": params, "D": tokens, "batch": batch}
        value = np.full(np.shape(params), self.scale)
        for name, exponent in self.exponents.items():
            value = value * known[name] ** exponent
        return value

    def expression(self) -> str:
        """Write it as a rule of a sweep's file."""
        return " * ".join([f"{self.scale:.4g}", *(f"{name} ** {value:.4g}" for name, value in self.exponents.items())])


@dataclass(frozen=True)
class Outside:
    """A size and tokens whose best rate lies outside the rates that were run with them."""

    params: float
    tokens: float
    best: float
    """Best rate by the law, for the batch of the run that is nearest to it."""
    low: float
    high: float
    """Least and greatest rate that were run."""

    def line(self) -> str:
        """Say it to a person."""
        size = f"N {format_count(self.params)}, D {format_count(self.tokens)}"
        return (
            f"{size}: the best rate is {self.best:.3g}, outside those that were run, {self.low:.3g} to {self.high:.3g}"
        )


@dataclass(frozen=True)
class RateLaw:
    """The best rate, and the best batch where the runs tell it."""

    lr: PowerRule
    batch: PowerRule | None
    curvature: float
    """Number `p`: a rate off by a factor `e` costs so much of the loss."""
    noise: float
    """Standard deviation of the log of the loss about the parabolas."""
    num_runs: int
    """Runs near enough to the best to be fitted."""
    outside: tuple[Outside, ...] = ()
    """Sizes and tokens that have no run on one side of their best rate."""

    def excess(self, runs: TunedRuns) -> np.ndarray:
        """Return the part of the loss that each run's rate costs against the best for its batch, `[n]`."""
        best = self.lr(runs.params, runs.tokens, runs.batch)
        return self.curvature * np.log(runs.lr / best) ** 2


def undertuned(runs: TunedRuns, law: RateLaw) -> dict[int, float]:
    """Return the loss that a run's rate costs, by row, for the runs that it costs more than `UNDERTUNED`."""
    excess = law.excess(runs)
    return {int(row): float(part) for row, part in zip(runs.rows, excess, strict=True) if part > UNDERTUNED}


def weigh_undertuned(table: Table) -> tuple[Table, dict[str, dict[int, float]]]:
    """Let runs count less in the laws the more their rates cost: half at `UNDERTUNED`, a tenth at three times as much.

    Returns:
        The table, and the undertuned runs among those that laws are fitted to, by series and row.

    Raises:
        DataError: If the table has no rates, or those of a series do not tell the best one.
    """
    series, found = {}, {}
    for name, runs in read_tuned(table).items():
        if (points := table.series.get(name)) is None:
            continue
        kept = runs.take(np.isin(runs.rows, points.rows))
        law = _named(name, runs, transfer=False)
        costs = dict(zip(kept.rows.tolist(), law.excess(kept).tolist(), strict=True))
        parts = np.array([costs.get(row, 0.0) for row in points.rows.tolist()])
        series[name] = replace(points, weights=1 / (1 + (parts / UNDERTUNED) ** 2))
        found[name] = undertuned(kept, law)
    return replace(table, series={**table.series, **series}), found


def rates_of(table: Table, *, transfer: bool = False) -> dict[str, tuple[TunedRuns, RateLaw]]:
    """Fit the best rate of every series of a table.

    Raises:
        DataError: Failures of `fit_rates`, with the name of the series.
    """
    return {name: (runs, _named(name, runs, transfer=transfer)) for name, runs in read_tuned(table).items()}


def _named(name: str, runs: TunedRuns, *, transfer: bool) -> RateLaw:
    try:
        return fit_rates(runs, transfer=transfer)
    except DataError as error:
        raise DataError(f"series {name}: {error.message}", error.hint) from None


def describe_rates(name: str, runs: TunedRuns, law: RateLaw, points: Points) -> list[str]:
    """Return lines that tell a person the best rate and batch of a series, and which runs of its law are far from it.

    `points` are the runs that laws are fitted to, the best of each size and tokens.
    """
    double = 100 * law.curvature * np.log(2) ** 2
    lines = [f"{name}: {law.num_runs} of {len(runs.rows)} runs are near the best rate of their size and tokens"]
    for key, rule in (("optim.lr", law.lr), ("train.global_batch_tokens", law.batch)):
        if rule is not None:
            text = rule.expression() if key == "optim.lr" else f"pow2({rule.expression()})"
            factor = np.exp(rule.spread)
            lines.append(f"  {key}: {text}    within a factor of {factor:.3g} in the middle of the runs")
            lines += [
                f"    {exponent:<6} {rule.exponents[exponent]:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
                for exponent, interval in rule.intervals.items()
            ]
    lines.append(f"  twice or half the best rate costs {double:.2g} % of the loss; noise {100 * law.noise:.2g} %")
    lines += [f"  {one.line()}" for one in law.outside]
    kept = runs.take(np.isin(runs.rows, points.rows))
    far, factors = undertuned(kept, law), kept.lr / law.lr(kept.params, kept.tokens, kept.batch)
    lines += [
        f"  row {row:.0f}: its rate is {factor:.2g} times the best, and costs {100 * far[row]:.2g} % of the loss"
        for row, factor in zip(kept.rows.tolist(), factors.tolist(), strict=True)
        if row in far
    ]
    return lines


def rates_json(law: RateLaw) -> dict[str, Any]:
    """Return a law of rates as JSON has it."""

    def rule(of: PowerRule | None) -> dict[str, Any] | None:
        if of is None:
            return None
        intervals = {name: vars(interval) for name, interval in of.intervals.items()}
        return {"scale": of.scale, "exponents": of.exponents, "intervals": intervals, "rule": of.expression()}

    numbers = {"curvature": law.curvature, "noise": law.noise, "num_runs": law.num_runs}
    outside = [vars(one) for one in law.outside]
    return {"lr": rule(law.lr), "batch": rule(law.batch), **numbers, "outside": outside}


def read_tuned(table: Table) -> dict[str, TunedRuns]:
    """Return all finished runs of a table by series, with their rates and, where there is such a column, batches.

    Runs that went back to a lower rate are left out.

    Raises:
        DataError: If the table has no column of learning rates, or a cell of rates or batches is not a number above 0.
    """
    rates = table.column("lr")
    batches = table.column("batch") if table.has("batch") else dict.fromkeys(rates, 1.0)
    found: dict[str, list[tuple[float, ...]]] = {}
    gone = table.went_back()
    for number, series, (params, tokens, _, loss) in table.finished:
        if number in rates and number in batches and number not in gone:
            run = (number, params, tokens, batches[number], rates[number], loss)
            found.setdefault(series, []).append(run)
    return {name: TunedRuns(*np.array(rows).T) for name, rows in found.items()}


def fit_rates(runs: TunedRuns, *, transfer: bool = False, seed: int = 0) -> RateLaw:
    """Fit the best rate of a series.

    Args:
        runs: Runs of the series; some have the same size and tokens and different rates.
        transfer: Whether rates hold for every size, as they do under muP (`model.transfer`): the law is then without N.
        seed: Seed of the resampling for intervals.

    Raises:
        DataError: If no size has three rates near its best, the runs are too few, or the best rates of all sizes are
            far from those that were run.
    """
    is_near = _near(runs)
    near = runs.take(is_near)
    group = near.groups()
    if not len(group):
        raise DataError("no size has three learning rates at one number of tokens, the best inside", _DESIGN)
    logs = {name: np.log(getattr(near, column)) for name, column in _COLUMNS.items()}
    centres = {name: float(values.mean()) for name, values in logs.items()}
    x, b, n, d = (logs[name] - centres[name] for name in ("x", "b", "n", "d"))
    fixed = np.eye(group.max() + 1)[group]
    columns: dict[str, np.ndarray] = {"p": x**2, "q0": x}
    optional = {"qn": x * n, "qd": x * d, "s": x * b, "r": b**2, "u0": b, "un": b * n, "ud": b * d}
    for name, column in optional.items():
        if name == "qn" and transfer:
            continue
        if _adds(np.column_stack([fixed, *columns.values()]), column):
            columns[name] = column
    design = np.column_stack([fixed, *columns.values()])
    freedom = len(x) - design.shape[1]
    if freedom < 1:
        message = f"{len(x)} runs near their best rate are too few for the {design.shape[1]} numbers of parabolas"
        raise DataError(message, _DESIGN)
    inverse = np.linalg.inv(design.T @ design)
    numbers = inverse @ design.T @ np.log(near.loss)
    rest = float(np.sum((np.log(near.loss) - design @ numbers) ** 2))
    names, first = list(columns), fixed.shape[1]
    rng = np.random.default_rng(seed)
    noise = rng.multivariate_normal(np.zeros(len(names)), inverse[first:, first:], size=_DRAWS, method="eigh")
    draws = numbers[first:] + np.sqrt(rest / rng.chisquare(freedom, size=(_DRAWS, 1))) * noise
    values = {name: numbers[first + place] for place, name in enumerate(names)}
    drawn = {name: draws[:, place] for place, name in enumerate(names)}
    if values["p"] <= 0:
        raise DataError("the loss has no lowest point over the learning rates that were run", _DESIGN)
    lr = _rule({"n": "qn", "d": "qd", "b": "s"}, values, drawn, centres)
    batch, outside = _batch_rule(values, drawn, centres), _outside(runs, is_near, lr)
    return RateLaw(lr, batch, float(values["p"]), float(np.sqrt(rest / freedom)), len(x), outside)


_COLUMNS = {"x": "lr", "b": "batch", "n": "params", "d": "tokens"}
_DESIGN = "run three or more rates, a factor of 2 apart with the best inside, at two sizes and two horizons"


def _near(runs: TunedRuns) -> np.ndarray:
    """Return the runs near the best of their size and tokens, of those sizes that have three rates there, `[n]`."""
    group, near = runs.groups(), np.zeros(len(runs.loss), dtype=bool)
    for number in range(group.max() + 1):
        own = group == number
        close = own & (runs.loss <= (1 + NEAR) * runs.loss[own].min())
        if len(np.unique(runs.lr[close])) >= 3:
            near |= close
    return near


def _outside(runs: TunedRuns, is_near: np.ndarray, lr: PowerRule) -> tuple[Outside, ...]:
    """Return the sizes and tokens on whose parabolas no run lies on one side of the best rate.

    Raises:
        DataError: If that is so of all, and the best rates are further than `FARTHEST` from those that were run.
    """
    group, found, is_far = runs.groups(), [], True
    numbers = np.unique(group[is_near])
    for number in numbers.tolist():
        own = runs.take(group == number)
        off = np.log(own.lr / lr(own.params, own.tokens, own.batch))
        nearest = int(np.argmin(np.abs(off)))
        is_far &= abs(float(off[nearest])) > np.log(FARTHEST)
        if off.min() > 0 or off.max() < 0:
            best = float(own.lr[nearest] * np.exp(-off[nearest]))
            size = float(own.params[0]), float(own.tokens[0])
            found.append(Outside(*size, best, float(own.lr.min()), float(own.lr.max())))
    if is_far and len(found) == len(numbers):
        raise DataError(f"no size has its best learning rate among those that were run: {found[0].line()}", _DESIGN)
    return tuple(found)


def _adds(columns: np.ndarray, column: np.ndarray) -> bool:
    """Tell whether a column is far from all that others make together."""
    rest = column - columns @ np.linalg.lstsq(columns, column, rcond=None)[0]
    return bool(np.linalg.norm(rest) > 1e-2 * max(1e-300, float(np.linalg.norm(column))))


def _rule(
    terms: Mapping[str, str],
    values: Mapping[str, float],
    drawn: Mapping[str, np.ndarray],
    centres: Mapping[str, float],
) -> PowerRule:
    """Return where the parabola in the rate is lowest, with the batch as it is."""
    half = -2 * values["p"]
    exponents = {_NAMES[place]: float(values[name] / half) for place, name in terms.items() if name in values}
    scale = centres["x"] + values["q0"] / half
    scale -= sum(exponents[_NAMES[place]] * centres[place] for place, name in terms.items() if name in values)
    halves = -2 * np.maximum(drawn["p"], 1e-3 * values["p"])
    intervals = {_NAMES[place]: Interval.of(drawn[name] / halves) for place, name in terms.items() if name in values}
    middle = Interval.of(drawn["q0"] / halves)  # every other variable is 0 there
    return PowerRule(float(np.exp(scale)), exponents, intervals, (middle.high - middle.low) / 2)


def _batch_rule(
    values: Mapping[str, float], drawn: Mapping[str, np.ndarray], centres: Mapping[str, float]
) -> PowerRule | None:
    """Return where loss at the best rate is lowest over the batch; None where no batch is the best inside."""
    if not {"r", "u0"} <= values.keys():
        return None

    def bottom(of: Mapping[str, np.ndarray | float], part: str) -> np.ndarray | float:
        curvature = 2 * of["r"] - of.get("s", 0.0) ** 2 / (2 * of["p"])
        return -(of.get(f"u{part}", 0.0) - of.get("s", 0.0) * of.get(f"q{part}", 0.0) / (2 * of["p"])) / curvature

    if 2 * values["r"] <= values.get("s", 0.0) ** 2 / (2 * values["p"]):
        return None
    there = [part for part in ("n", "d") if f"u{part}" in values or f"q{part}" in values]
    exponents = {_NAMES[part]: float(bottom(values, part)) for part in there}
    scale = centres["b"] + float(bottom(values, "0")) - sum(exponents[_NAMES[part]] * centres[part] for part in there)
    intervals = {_NAMES[part]: Interval.of(bottom(drawn, part)) for part in there}
    middle = Interval.of(bottom(drawn, "0"))
    return PowerRule(float(np.exp(scale)), exponents, intervals, (middle.high - middle.low) / 2)
