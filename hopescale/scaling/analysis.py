"""Everything that is said about a table of runs, put together: the law of each series, its checks, and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import format_count
from hopescale.scaling.best_runs import RunMultiplier, multipliers_of_runs
from hopescale.scaling.bootstrap import Forecast, Interval, forecast_largest, reweighted_laws
from hopescale.scaling.fit import Fit, fit_law
from hopescale.scaling.law import Cost
from hopescale.scaling.multiplier import Frontier, Multiplier, multiplier
from hopescale.scaling.points import SCORE, Points, Table
from hopescale.scaling.prediction import prediction_interval
from hopescale.scaling.scores import ScoreAnalysis, fit_scores
from hopescale.scaling.views import Envelope, IsoFlop, fit_isoflop, lower_envelope

USUAL_REFERENCE = "transformer"
RESAMPLES = 200


@dataclass(frozen=True)
class Optimum:
    """The best size for a budget by a law, with intervals where fits were repeated."""

    flops: float
    params: float
    tokens: float
    loss: float
    params_interval: Interval | None
    tokens_interval: Interval | None
    loss_interval: Interval | None
    """Interval of what the law says, without the noise of a run."""
    run_interval: Interval | None
    """Interval of the loss of one run of this size: with the noise that the runs have about the law."""


@dataclass(frozen=True)
class SeriesAnalysis:
    """One series: its runs, its law by the three views, and how far the law is to be trusted."""

    points: Points
    fit: Fit | None
    """Law of the runs; None where they are too few for one."""
    frontier: Frontier | None
    isoflop: IsoFlop
    envelope: Envelope
    forecast: Forecast | None
    """Law without the largest runs against these; None where too few would be left."""
    doubt: str | None
    """Reason why the best size for a budget is not determined; None where it is."""

    def optimum(self, flops: float) -> Optimum:
        """Return the best size for a budget, FLOPs. Only where there is no `doubt`."""
        best, *samples = [
            (*(size := law.optimal(flops, self.frontier.cost)), law.loss(*size))
            for law in (self.fit.law, *self.frontier.samples)
        ]
        if not samples:
            return Optimum(flops, *best, None, None, None, None)
        intervals = map(Interval.of, zip(*samples, strict=True))
        of_run = prediction_interval([sample[2] for sample in samples], self.fit.residuals)
        return Optimum(flops, *best, *intervals, of_run)

    def intervals(self) -> dict[str, Interval]:
        """Return the interval of each of the law's numbers, and of the exponents of `N(C)` and `D(C)`, as `a`, `b`."""
        numbers = [
            law.to_dict() | dict(zip("ab", law.optimal_exponents(self.frontier.cost), strict=True))
            for law in self.frontier.samples
        ]
        return {name: Interval.of([row[name] for row in numbers]) for name in numbers[0]} if numbers else {}


@dataclass(frozen=True)
class Analysis:
    """All series of a table."""

    table: Table
    series: dict[str, SeriesAnalysis]
    """Analysis by name of the series, in the table's order."""
    reference: str | None
    """Series that others are compared with; None where there is one series."""
    multipliers: dict[str, list[Multiplier]]
    """Multipliers of every other series over the reference by their laws, at rising budgets; none where a best size is
    not determined."""
    of_runs: dict[str, list[RunMultiplier]]
    """Multipliers of every other series over the reference by their best runs."""
    scores: ScoreAnalysis | str | None
    """Scores by loss, or the reason why they have no curve; None in a table without scores."""


def analyse(
    table: Table,
    reference: str | None = None,
    resamples: int = RESAMPLES,
    *,
    need_laws: bool = True,
    asymptote: float | None = None,
    score_column: str | None = None,
) -> Analysis:
    """Fit and compare the series of a table.

    Args:
        table: Table of runs.
        reference: Series that others are compared with; by default `transformer`, else the first.
        resamples: Number of reweighted fits for the intervals; 0 leaves intervals out.
        need_laws: Whether a series that is too small for a law is an error.
        asymptote: Value that `E` of every law is held at, nats per token; None fits it.
        score_column: Column of the runs' scores; None takes `score` if the table has it.

    Raises:
        DataError: If a series has too few runs for a law or FLOPs that do not rise with size, or there is no series of
            the reference's name, or no column of scores of the name that was given.
    """
    if reference is not None and reference not in table.series:
        raise DataError(f"{table.source} has no series {reference}, only {', '.join(table.series)}")
    series = {
        name: _analyse_series(name, points, resamples, seed, need_laws, asymptote)
        for seed, (name, points) in enumerate(table.series.items())
    }
    scores = _scores(table, resamples, score_column)
    if len(series) == 1:
        return Analysis(table, series, None, {}, {}, scores)
    reference = reference or (USUAL_REFERENCE if USUAL_REFERENCE in series else next(iter(series)))
    multipliers = {
        name: [
            multiplier(one.frontier, series[reference].frontier, flops)
            for flops in common_budgets(one.points, series[reference].points)
        ]
        for name, one in series.items()
        if name != reference and one.doubt is None and series[reference].doubt is None
    }
    of_runs = {
        name: multipliers_of_runs(one.points, series[reference].points)
        for name, one in series.items()
        if name != reference
    }
    return Analysis(table, series, reference, multipliers, of_runs, scores)


def common_budgets(series: Points, reference: Points, count: int = 5) -> list[float]:
    """Return budgets spread evenly, by ratio, over the range of both series, else over that of the series itself."""
    low = max(series.flops.min(), reference.flops.min())
    high = min(series.flops.max(), reference.flops.max())
    if low >= high:
        low, high = series.flops.min(), series.flops.max()
    return np.geomspace(low, high, count).tolist()


def _scores(table: Table, resamples: int, column: str | None) -> ScoreAnalysis | str | None:
    """Fit the scores. A bad column that nobody named does not stop the fit of laws: its problem is returned."""
    if column is not None:
        return fit_scores(table, table.series, resamples, column)
    try:
        return fit_scores(table, table.series, resamples, None) if SCORE in table.header else None
    except DataError as error:
        return error.message


def _analyse_series(
    name: str, points: Points, resamples: int, seed: int, need_law: bool, asymptote: float | None
) -> SeriesAnalysis:
    isoflop, envelope = fit_isoflop(points, 5 * resamples, seed), lower_envelope(points)
    try:
        fit, cost = fit_law(points, asymptote), points.cost()
    except DataError as error:
        if need_law:
            raise DataError(f"series {name}: {error.message}", error.hint) from None
        return SeriesAnalysis(points, None, None, isoflop, envelope, None, error.message)
    samples = reweighted_laws(points, fit, resamples, seed, asymptote) if resamples else []
    frontier, doubt = Frontier(fit.law, samples, cost), _doubt(fit, points, cost)
    forecast = forecast_largest(points, asymptote)
    return SeriesAnalysis(points, fit, frontier, isoflop, envelope, forecast, doubt)


def _doubt(fit: Fit, points: Points, cost: Cost) -> str | None:
    """Say why a law's best size cannot be relied on: a number at the end of its range, or a size far from the runs."""
    if at_end := [name for name in fit.undetermined if name != "E"]:
        return f"the runs do not determine {' and '.join(at_end)} of the law"
    best, (low, high) = fit.law.optimal(points.flops.max(), cost)[0], (points.params.min(), points.params.max())
    if low <= best <= high:
        return None
    sizes = f"{format_count(float(low))} to {format_count(float(high))}"
    return (
        f"by the law it is {format_count(best)} parameters for the largest budget that was run, outside the sizes that "
        f"were run, {sizes}"
    )
