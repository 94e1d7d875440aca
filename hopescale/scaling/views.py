"""Two views without a law (Hoffmann et al., arXiv 2203.15556, sections 3.1 and 3.2).

At each budget a parabola through loss over log size, and how its minimum moves; runs of one budget are found in the
table: FLOPs within 25 %. And the runs that no cheaper run beats, and how their sizes grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hopescale.scaling.bootstrap import SAME_BUDGET, Interval
from hopescale.scaling.fit import num_distinct
from hopescale.scaling.points import Points

_FEWEST = 3
_APART = 1.5
_MARGIN = np.log(10.0)


@dataclass(frozen=True)
class PowerLaw:
    """`y = scale * C^exponent` in FLOPs."""

    scale: float
    exponent: float
    interval: Interval | None

    def __call__(self, flops: float) -> float:
        return self.scale * flops**self.exponent

    @classmethod
    def through(
        cls,
        flops: np.ndarray,
        values: np.ndarray,
        samples: np.ndarray | None = None,
        errors: np.ndarray | None = None,
    ) -> PowerLaw:
        """Fit values `[m]` by least squares of logs over at least two budgets `[m]`.

        Args:
            flops: Budgets.
            values: Values at the budgets.
            samples: Other values that noise could have given, `[K, m]`, for the interval of the exponent.
            errors: Standard errors of the logs, up to a common factor, `[m]`; all the same where there are none.
        """
        x, weights = np.log(flops), None if errors is None else 1 / errors
        exponent, offset = np.polyfit(x, np.log(values), 1, w=weights)
        slopes = None if samples is None else np.polyfit(x, np.log(samples).T, 1, w=weights)[0]
        return cls(float(np.exp(offset)), float(exponent), None if slopes is None else Interval.of(slopes))


@dataclass(frozen=True)
class Parabola:
    """The runs of one budget and the parabola through them: `loss = c0 + c1 x + c2 x^2`, `x = ln(N / centre)`.

    `params`, `tokens` and `loss` are those at its minimum; their intervals are None where no run is left over to judge
    the noise by.
    """

    points: Points
    flops: float
    """Median FLOPs of the runs."""
    centre: float
    """Geometric mean of their sizes."""
    coefficients: np.ndarray
    params: float
    tokens: float
    error: float
    """Standard error of the minimum's `x`, in units of the standard deviation of a run's loss."""
    loss: float
    inside: bool
    """Whether the parabola opens upwards with its minimum between the smallest and the largest size."""
    sizes: np.ndarray | None
    """Sizes at the minima of draws of the parabola, `[K]`."""
    params_interval: Interval | None
    loss_interval: Interval | None

    def __call__(self, params: np.ndarray) -> np.ndarray:
        """Return the parabola's loss at sizes."""
        return np.polynomial.polynomial.polyval(np.log(params / self.centre), self.coefficients)


@dataclass(frozen=True)
class IsoFlop:
    """The parabolas of a table, smallest budget first, and `N(C)` and `D(C)` through their minima.

    Minima count that lie between the sizes of their runs; fewer than two give no power law.
    """

    parabolas: list[Parabola]
    params: PowerLaw | None
    tokens: PowerLaw | None


@dataclass(frozen=True)
class Envelope:
    """The runs on the lower envelope of a table, the cheapest first, and `N(C)` and `D(C)` through three or more."""

    points: Points
    params: PowerLaw | None
    tokens: PowerLaw | None


def runs_by_budget(points: Points) -> list[Points]:
    """Return the runs of each budget, smallest budget first; runs between budgets are in none.

    A budget has at least 3 sizes, and at least a third as many runs as the one that has most.

    The budget with most runs within 25 % of each other comes first, then the next among runs that are 50 % off it.
    """
    logs = np.log(points.flops)
    width = np.log(SAME_BUDGET)
    free = np.ones(len(points), dtype=bool)
    budgets: list[np.ndarray] = []
    while free.any():
        windows = [free & (logs >= low - 1e-9) & (logs <= low + width) for low in logs[free]]
        best = max(windows, key=lambda window: int(window.sum()))
        if num_distinct(points.params[best]) >= _FEWEST:
            budgets.append(best)
        middle = np.median(logs[best])
        free &= np.abs(logs - middle) > np.log(_APART)
    most = max((int(mask.sum()) for mask in budgets), default=0)
    budgets = [mask for mask in budgets if 3 * mask.sum() >= most]
    return [points.take(mask) for mask in sorted(budgets, key=lambda mask: np.median(logs[mask]))]


def fit_isoflop(points: Points, count: int, seed: int = 0) -> IsoFlop:
    """Fit a parabola to every budget of a table.

    Intervals take the noise to be the same at every budget: its variance is the mean square of what all parabolas
    leave over, known as well as there are more runs than coefficients. `count` draws of variance and coefficients,
    as a normal distribution of unknown variance has them, give each minimum's spread; 0 gives no intervals.
    """
    groups = runs_by_budget(points)
    fits = [_least_squares(group) for group in groups]
    freedom = sum(len(group) - 3 for group in groups)
    rng = np.random.default_rng(seed)
    variance = None
    if freedom > 0 and count:
        variance = sum(rest for _, _, rest in fits) / rng.chisquare(freedom, size=count)
    parabolas, draws = [], None
    for group, (coefficients, inverse, _) in zip(groups, fits, strict=True):
        if variance is not None:
            noise = rng.multivariate_normal(np.zeros(3), inverse, size=count, method="eigh")
            draws = coefficients + np.sqrt(variance)[:, None] * noise
        parabolas.append(_parabola(group, coefficients, inverse, draws))
    inside = [parabola for parabola in parabolas if parabola.inside]
    if len(inside) < 2:
        return IsoFlop(parabolas, None, None)
    optima = [(parabola.flops, parabola.params, parabola.tokens, parabola.error) for parabola in inside]
    flops, params, tokens, errors = np.array(optima).T
    sizes = None if draws is None else np.stack([parabola.sizes for parabola in inside], axis=1)
    durations = None if sizes is None else tokens * params / sizes
    laws = [PowerLaw.through(flops, *pair, errors) for pair in ((params, sizes), (tokens, durations))]
    return IsoFlop(parabolas, *laws)


def _least_squares(points: Points) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a parabola's coefficients, the inverse of its normal matrix, and the sum of squares left over."""
    x = np.log(points.params)
    design = np.vander(x - x.mean(), 3, increasing=True)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ points.loss
    return coefficients, inverse, float(np.sum((points.loss - design @ coefficients) ** 2))


def _parabola(points: Points, coefficients: np.ndarray, inverse: np.ndarray, draws: np.ndarray | None) -> Parabola:
    x = np.log(points.params)
    limits = x.min() - x.mean(), x.max() - x.mean()
    vertex = float(_vertex(coefficients[None], limits)[0])
    sizes = losses = None
    if draws is not None:
        vertices = _vertex(draws, limits)
        sizes = np.exp(x.mean() + vertices)
        losses = np.polynomial.polynomial.polyval(vertices, draws.T, tensor=False)
    slope, offset = np.polyfit(x - x.mean(), np.log(points.tokens), 1)
    gradient = np.array([0.0, 1.0, 2 * vertex]) / (2 * coefficients[2])
    return Parabola(
        points=points,
        flops=float(np.median(points.flops)),
        centre=float(np.exp(x.mean())),
        coefficients=coefficients,
        params=float(np.exp(x.mean() + vertex)),
        tokens=float(np.exp(offset + slope * vertex)),
        error=float(np.sqrt(gradient @ inverse @ gradient)),
        loss=float(np.polynomial.polynomial.polyval(vertex, coefficients)),
        inside=bool(coefficients[2] > 0 and limits[0] < vertex < limits[1]),
        sizes=sizes,
        params_interval=None if sizes is None else Interval.of(sizes),
        loss_interval=None if losses is None else Interval.of(losses),
    )


def _vertex(coefficients: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return where parabolas `[K, 3]` are least, `[K]`, no further than a factor of 10 from the sizes that were run."""
    _, slope, curvature = coefficients.T
    far = -np.sign(slope) * np.inf
    vertex = np.where(curvature > 0, -slope / (2 * np.where(curvature > 0, curvature, 1.0)), far)
    return np.clip(vertex, limits[0] - _MARGIN, limits[1] + _MARGIN)


def lower_envelope(points: Points) -> Envelope:
    """Return the runs with less loss than every run of as many FLOPs or fewer, and power laws through them.

    The laws carry no intervals: which runs lie on the envelope is itself decided by noise.
    """
    order = np.lexsort((points.loss, points.flops))
    best = np.minimum.accumulate(points.loss[order])
    front = points.take(order[np.concatenate([[True], best[1:] < best[:-1]])])
    if len(front) < 3:
        return Envelope(front, None, None)
    return Envelope(front, PowerLaw.through(front.flops, front.params), PowerLaw.through(front.flops, front.tokens))
