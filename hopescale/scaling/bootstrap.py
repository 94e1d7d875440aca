"""How far a law is to be trusted: intervals from reweighted fits, and a forecast of the largest runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hopescale.common.errors import DataError
from hopescale.scaling.fit import Fit, fit_law, fit_many
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points

LEVEL = 0.95
"""Probability with which an interval is to hold the true value."""

_TOP_SHARE = 0.9
SAME_BUDGET = 1.25
"""Runs whose FLOPs differ by no more than this factor are taken for one budget."""


@dataclass(frozen=True)
class Interval:
    """Both ends of an interval; infinite where the runs set no end."""

    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> Interval:
        """Return the middle `LEVEL` of a sample, `[K]`."""
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(samples, [tail, 1 - tail], method="closest_observation")
        return cls(float(low), float(high))

    def map(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of a rising function of the value."""
        return Interval(float(function(self.low)), float(function(self.high)))


@dataclass(frozen=True)
class Forecast:
    """The law without the runs of most compute, held against these runs."""

    law: Law
    flops: float
    """FLOPs from which on runs were left out."""
    errors: np.ndarray
    """Log of observed over predicted loss of the runs left out, `[m]`."""


def reweighted_laws(points: Points, fit: Fit, count: int, seed: int = 0, asymptote: float | None = None) -> list[Law]:
    """Fit the law again under `count` random weightings of the runs; the spread is that of the law.

    Weights are exponential, as in the Bayesian bootstrap (Rubin 1981): like drawing runs with replacement, but each
    run keeps a part, so that twelve runs of a small sweep still determine five numbers. Each search starts from the law
    of all runs. An `asymptote` is held at its value in all of them.
    """
    weights = np.random.default_rng(seed).exponential(size=(count, len(points))) * points.counts
    start = np.tile([fit.law.alpha, fit.law.beta], (count, 1))
    return [Law(*numbers) for numbers in fit_many(points, weights, start, asymptote)[0].tolist()]


def forecast_largest(points: Points, asymptote: float | None = None) -> Forecast | None:
    """Fit the law without the largest runs and predict them: their tenth in FLOPs, and all of its smallest's budget.

    None where too few runs would be left to fit.
    """
    threshold = np.sort(points.flops)[int(_TOP_SHARE * len(points))] / SAME_BUDGET
    largest = points.flops >= threshold
    try:
        law = fit_law(points.take(~largest), asymptote).law
    except DataError:
        return None
    top = points.take(largest)
    return Forecast(law, float(top.flops.min()), np.log(top.loss) - np.log(law.loss(top.params, top.tokens)))
