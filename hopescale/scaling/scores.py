"""Scores of runs beside their losses: a curve from loss to score, and the scores of a series at equal loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.points import Points, Table

FEWEST_RUNS, FEWEST_LOSSES = 6, 4
"""Runs, and different losses among them, that a curve of three numbers needs."""

_RATES = np.geomspace(0.05, 20, 600)
"""Rates that a fit tries, per nat."""

_NUMBERS = 3


@dataclass(frozen=True)
class ScoreCurve:
    """The law `score = floor + gain exp(-rate L)`: `1 - Err(L)` of Gadre et al. (arXiv 2403.08540)."""

    floor: float
    """Score at a high loss: that of a guess, where the runs go so far."""
    gain: float
    rate: float
    """Rate at which the score falls with the loss, per nat."""

    def __call__(self, loss: float | np.ndarray) -> np.ndarray:
        """Return the score at losses, nats per token; at most 1."""
        return np.minimum(1.0, self.floor + self.gain * np.exp(-self.rate * np.asarray(loss)))


@dataclass(frozen=True)
class ScoreAnalysis:
    """The scores of a table's runs, and how they follow the loss."""

    loss: np.ndarray
    """Losses of the runs that have a score, nats per token, `[n]`."""
    score: np.ndarray
    """Scores, from 0 to 1, `[n]`."""
    series: np.ndarray
    """Names of the series of the runs, `[n]`."""
    curve: ScoreCurve
    """Curve through the runs of all series."""
    samples: list[ScoreCurve]
    """Curves of reweighted fits; none without resamples."""
    correlation: float
    """Spearman's rank correlation of loss and score."""
    correlation_interval: Interval | None
    apart: dict[str, tuple[float, Interval | None]]
    """Mean distance of each series from the curve of all: its score at equal loss. None where there is one series."""

    def of_run(self, loss: float, losses: Sequence[float] = ()) -> tuple[float, Interval | None]:
        """Return the score of one more run by its loss, and the interval of it.

        Args:
            loss: Loss that a law says, nats per token.
            losses: Losses that reweighted fits of that law say, `[K]`. Each is put into the curve of a reweighted fit,
                and gets each residual of the scores, made larger by as much as three fitted numbers made them smaller.
        """
        if not self.samples or not len(losses):
            return float(self.curve(loss)), None
        noise = (self.score - self.curve(self.loss)) * np.sqrt(len(self.loss) / (len(self.loss) - _NUMBERS))
        likely = [curve(one) for curve, one in zip(self.samples, np.resize(losses, len(self.samples)), strict=True)]
        return float(self.curve(loss)), Interval.of(np.add.outer(likely, noise).clip(0, 1).ravel())


def fit_scores(table: Table, series: Mapping[str, Points], resamples: int, column: str | None) -> ScoreAnalysis | str:
    """Fit the scores of a table's runs, or say why they are too few.

    Args:
        table: Table with a column of scores.
        series: Runs of each series, with their rows in the table.
        resamples: Number of reweighted fits for the intervals, which are as those of laws; 0 leaves intervals out.
        column: Name of the column; None is `score`.

    Raises:
        DataError: If there is no such column, or a cell of it is no number from 0 to 1.
    """
    scores = table.scores(column)
    runs = [
        (loss, scores[row], name)
        for name, points in series.items()
        for row, loss in zip(points.rows.tolist(), points.loss.tolist(), strict=True)
        if row in scores
    ]
    num_losses = len({loss for loss, _, _ in runs})
    if len(runs) < FEWEST_RUNS or num_losses < FEWEST_LOSSES:
        return f"{len(runs)} runs of {num_losses} losses have a score; a curve needs {FEWEST_RUNS} of {FEWEST_LOSSES}"
    loss, score, names = (np.array(values) for values in zip(*runs, strict=True))
    drawn = np.random.default_rng(0).exponential(size=(resamples, len(loss)))
    weights = np.vstack([np.ones(len(loss)), drawn])
    curve, *samples = fit_curves(loss, score, weights)
    correlation, *correlations = _rank_correlations(loss, score, weights).tolist()
    apart, distances = {}, np.array([score - each(loss) for each in (curve, *samples)])
    for name in dict.fromkeys(names.tolist()) if len(set(names)) > 1 else ():
        own = weights * (names == name)
        mean, *means = ((own * distances).sum(1) / own.sum(1)).tolist()
        apart[name] = mean, Interval.of(means) if means else None
    interval = Interval.of(correlations) if correlations else None
    return ScoreAnalysis(loss, score, names, curve, samples, correlation, interval, apart)


def fit_curves(loss: np.ndarray, score: np.ndarray, weights: np.ndarray) -> list[ScoreCurve]:
    """Return the curve of least weighted squares for each row of weights.

    For a given rate, floor and gain are a linear problem with a solution in closed form; neither is below 0. The rate
    is the best of a grid whose steps are 1 %.

    Args:
        loss: Losses, nats per token, `[n]`.
        score: Scores, `[n]`.
        weights: Weights of the runs, `[K, n]`.
    """
    start = loss.min()
    falls = np.exp(-_RATES[:, None] * (loss - start))  # [G, n]
    w, wy, wyy = (weights @ column for column in (np.ones(len(loss)), score, score**2))
    we, wye, wee = weights @ falls.T, weights @ (falls * score).T, weights @ (falls**2).T  # [K, G]
    w, wy, wyy = w[:, None], wy[:, None], wyy[:, None]
    gain = np.maximum((w * wye - we * wy) / np.maximum(w * wee - we**2, 1e-300), 0.0)
    floor = (wy - gain * we) / w
    gain = np.where(floor < 0, wye / wee, gain)
    floor = np.maximum(floor, 0.0)
    errors = wyy - 2 * (floor * wy + gain * wye - floor * gain * we) + floor**2 * w + gain**2 * wee
    best = errors.argmin(1)
    rows = np.arange(len(weights))
    rate = _RATES[best]
    numbers = zip(floor[rows, best], gain[rows, best] * np.exp(rate * start), rate, strict=True)
    return [ScoreCurve(*map(float, row)) for row in numbers]


def _rank_correlations(loss: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the correlation of the ranks of two columns for each row of weights, `[K]`; 0 where all are equal."""
    weights = weights / weights.sum(1, keepdims=True)
    x, y = ((rank - (weights @ rank)[:, None]) for rank in (_mean_ranks(loss), _mean_ranks(score)))
    spread = np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))
    return (weights * x * y).sum(1) / np.where(spread > 0, spread, np.inf)


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 on, `[n]`; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
