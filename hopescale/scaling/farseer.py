"""A second form of the law, in which the data's exponent depends on the size (Farseer, arXiv 2506.10972).

    L(N, D) = exp(a3 N^g3 + b3) + exp(a2 N^g2 + b2) * D^-exp(a1 N^g1 + b1)

Each of the three functions of the size is kept as its value at the runs' mean size, its slope there over the log of the
size, and its power `g`, which may be 0. All nine numbers are searched for together, with the same Huber loss as in
`fit`, from several starts at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import plural
from hopescale.scaling.fit import DELTA, fit_law, huber_step, num_distinct
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points

FEWEST_RUNS, FEWEST_SIZES = 14, 4
"""What nine numbers are fitted to at least."""

POWER = 1.0
"""Greatest size of a power `g`."""

_STARTS = (0.0, -0.4, 0.4)
_MAX_STEPS = 200
_TOLERANCE = 1e-9
_POWERS = np.array([2, 5, 8])
"""Places of the powers among the nine numbers: value, slope and power of each function."""


@dataclass(frozen=True)
class FarseerLaw:
    """The loss of a model of N parameters after D tokens, by nine numbers."""

    numbers: np.ndarray
    """Value, slope and power of the asymptote's log, of the log of the data term's scale, and of the log of its
    exponent, `[9]`."""
    centre: float
    """Log of the size at which values and slopes are meant."""

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Return the predicted loss in nats per token."""
        x, y = np.log(params) - self.centre, np.log(tokens)
        logs = _terms(self.numbers[None], np.atleast_1d(x), np.atleast_1d(y))[0]
        return np.exp(logs).sum(axis=-1)[0].reshape(np.shape(y))


def fit_farseer(points: Points, law: Law | None = None) -> FarseerLaw:
    """Fit the law to runs, from a law of five numbers and nearby ones; the same runs give the same law.

    Args:
        points: Runs.
        law: Law to start from; None is that of `fit_law`.

    Raises:
        DataError: If the runs are too few, or of too few sizes.
    """
    if too_few_for_nine(points):
        counted = f"{plural(len(points), 'run')} of {plural(num_distinct(points.params), 'size')}"
        message = f"{counted} are too few for a law of 9 numbers"
        raise DataError(message, f"it needs {FEWEST_RUNS} runs of {FEWEST_SIZES} sizes")
    return fit_parts(points, points.counts[None], [law or fit_law(points).law])[0]


def too_few_for_nine(points: Points) -> bool:
    """Tell whether nine numbers cannot be told from runs."""
    return len(points) < FEWEST_RUNS or num_distinct(points.params) < FEWEST_SIZES


def fit_parts(points: Points, weights: np.ndarray, laws: Sequence[Law]) -> list[FarseerLaw]:
    """Fit one law per row of weights, `[K, n]`, each from a law of five numbers and nearby ones; keep the best."""
    centre = float(np.log(points.params).mean())
    start = np.concatenate([_starts(points, law) for law in laws])
    rows = np.repeat(weights, len(_STARTS), axis=0)
    numbers, objectives = farseer_many(points, rows, start)
    best = objectives.reshape(len(laws), -1).argmin(axis=1) + np.arange(len(laws)) * len(_STARTS)
    return [FarseerLaw(row, centre) for row in numbers[best]]


def _starts(points: Points, law: Law) -> np.ndarray:
    """Return numbers to start from, `[S, 9]`: the law of five numbers, with powers about 0."""
    x = np.log(points.params) - np.log(points.params).mean()
    slope, value = np.polyfit(x, np.log(law.E + law.A * points.params**-law.alpha), 1)
    row = [value, slope, 0.0, np.log(law.B), 0.0, 0.0, np.log(law.beta), 0.0, 0.0]
    rows = np.tile(row, (len(_STARTS), 1))
    rows[:, _POWERS[0]] = _STARTS
    return rows


def farseer_many(points: Points, weights: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit one law per row of weights by damped Newton steps on the Huber loss.

    Args:
        points: Runs.
        weights: Weight of each run in each fit, `[K, n]`, not negative.
        start: Nine numbers to start from, about the mean log size of `points`, `[K, 9]`.

    Returns:
        The numbers, `[K, 9]`, and the mean Huber loss of each, `[K]`.
    """
    x, y, log_loss = np.log(points.params) - np.log(points.params).mean(), np.log(points.tokens), np.log(points.loss)
    weights, numbers = weights / weights.sum(axis=1, keepdims=True), start.copy()

    def objective(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        size = np.abs(np.logaddexp.reduce(_terms(values, x, y)[0], axis=-1) - log_loss)
        huber = np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
        return np.sum(rows * huber, axis=1)

    best, damping, active = objective(numbers, weights), np.ones(len(numbers)), np.arange(len(numbers))
    for _ in range(_MAX_STEPS):
        slopes, residual = _slopes(numbers[active], x, y, log_loss)
        move = huber_step(slopes, residual, weights[active], damping[active][:, None])
        new = numbers[active] + move
        new[:, _POWERS] = np.clip(new[:, _POWERS], -POWER, POWER)
        value = objective(new, weights[active])
        better = value < best[active]
        numbers[active[better]], best[active[better]] = new[better], value[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.4, 5.0), 1e-3, 1e6)
        active = active[(np.abs(move).max(axis=1) > _TOLERANCE) & (damping[active] < 1e6)]
        if not len(active):
            break
    return numbers, best


def _terms(numbers: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logs of both terms, `[K, n, 2]`, and the data's exponent at each run, `[K, n]`."""
    asymptote, scale, log_exponent = (_function(numbers[:, place : place + 3], x)[0] for place in (0, 3, 6))
    exponent = np.exp(np.clip(log_exponent, -50, 5))
    return np.stack([asymptote, scale - exponent * y], axis=-1), exponent


def _slopes(numbers: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the slopes of the residuals by the nine numbers, `[K, n, 9]`, and the residuals, `[K, n]`."""
    logs, exponent = _terms(numbers, x, y)
    total = np.logaddexp.reduce(logs, axis=-1)
    first, second = np.moveaxis(np.exp(logs - total[..., None]), -1, 0)
    outer = (first, second, -second * y * exponent)
    inner = [_function(numbers[:, place : place + 3], x)[1] for place in (0, 3, 6)]
    slopes = [factor[..., None] * part for factor, part in zip(outer, inner, strict=True)]
    return np.concatenate(slopes, axis=-1), total - log_loss


def _function(numbers: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `value + slope (exp(g x) - 1) / g` for rows of numbers, `[K, n]`, and its slopes by them, `[K, n, 3]`."""
    value, slope, power = (numbers[:, place : place + 1] for place in range(3))
    small = np.abs(power) < 1e-4
    safe = np.where(small, 1.0, power)
    rise = np.where(small, x + power * x**2 / 2, np.expm1(safe * x) / safe)
    bend = np.where(small, x**2 / 2 + power * x**3 / 3, (x * np.exp(safe * x) - rise) / safe)
    return value + slope * rise, np.stack([np.ones_like(rise), rise, slope * bend], axis=-1)
