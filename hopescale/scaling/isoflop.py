"""A second view without a law: at each budget a parabola through loss over log size, and how its minimum moves.

(Hoffmann et al., arXiv 2203.15556, section 3.2.) Runs of one budget are found in the table: FLOPs within 25 %.
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
        """Fit by least squares of logs over at least two budgets.

        Args:
            flops: `[m]`.
            values: `[m]`.
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

    Attributes:
        points: Runs.
        flops: Their median FLOPs.
        centre: Geometric mean of their sizes.
        coefficients: `c0 c1 c2`.
        params: Size at the minimum.
        tokens: Tokens there.
        error: Standard error of the minimum's `x`, in units of the standard deviation of a run's loss.
        loss: Loss there, nats per token.
        inside: True if the parabola opens upwards with its minimum between the smallest and the largest size.
        params_interval: Interval of `params`; None where no run is left over to judge the noise by.
        loss_interval: Interval of `loss`.
    """

    points: Points
    flops: float
    centre: float
    coefficients: np.ndarray
    params: float
    tokens: float
    error: float
    loss: float
    inside: bool
    params_interval: Interval | None
    loss_interval: Interval | None

    def __call__(self, params: np.ndarray) -> np.ndarray:
        """Return the parabola's loss at sizes."""
        return np.polynomial.polynomial.polyval(np.log(params / self.centre), self.coefficients)


@dataclass(frozen=True)
class IsoFlop:
    """The parabolas of a table, and power laws through those minima that lie between the sizes of their runs.

    Attributes:
        parabolas: Parabolas by budget, smallest first.
        params: `N(C)`; None where fewer than two budgets have a minimum.
        tokens: `D(C)`.
    """

    parabolas: list[Parabola]
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
    as a normal distribution of unknown variance has them, give each minimum's spread.

    Args:
        points: Runs of one series.
        count: Draws; 0 gives no intervals.
        seed: Seed of the draws.
    """
    groups = runs_by_budget(points)
    fits = [_least_squares(group) for group in groups]
    freedom = sum(len(group) - 3 for group in groups)
    rng = np.random.default_rng(seed)
    variance = None
    if freedom > 0 and count:
        variance = sum(rest for _, _, rest in fits) / rng.chisquare(freedom, size=count)
    parabolas: list[Parabola] = []
    params: list[np.ndarray] = []
    for group, (coefficients, inverse, _) in zip(groups, fits, strict=True):
        draws = coefficients[None]
        if variance is not None:
            noise = rng.multivariate_normal(np.zeros(3), inverse, size=count, method="eigh")
            draws = coefficients + np.sqrt(variance)[:, None] * noise
        parabola, sizes = _parabola(group, coefficients, inverse, draws if variance is not None else None)
        if parabola.inside:
            params.append(sizes)
        parabolas.append(parabola)
    inside = [parabola for parabola in parabolas if parabola.inside]
    if len(inside) < 2:
        return IsoFlop(parabolas, None, None)
    flops = np.array([parabola.flops for parabola in inside])
    samples = np.stack(params, axis=1) if variance is not None else None
    optima = np.array([(parabola.params, parabola.tokens) for parabola in inside]).T
    tokens = None if samples is None else optima[1] * optima[0] / samples
    errors = np.array([parabola.error for parabola in inside])
    laws = [PowerLaw.through(flops, *pair, errors) for pair in ((optima[0], samples), (optima[1], tokens))]
    return IsoFlop(parabolas, *laws)


def _least_squares(points: Points) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a parabola's coefficients, the inverse of its normal matrix, and the sum of squares left over."""
    x = np.log(points.params)
    design = np.vander(x - x.mean(), 3, increasing=True)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ points.loss
    return coefficients, inverse, float(np.sum((points.loss - design @ coefficients) ** 2))


def _parabola(
    points: Points, coefficients: np.ndarray, inverse: np.ndarray, draws: np.ndarray | None
) -> tuple[Parabola, np.ndarray]:
    """Describe a parabola; return with it the size at the minimum of each draw, `[K]`."""
    x = np.log(points.params)
    limits = x.min() - x.mean(), x.max() - x.mean()
    vertex = float(_vertex(coefficients[None], limits)[0])
    sizes = np.exp(x.mean() + (_vertex(draws, limits) if draws is not None else np.array([vertex])))
    losses = None if draws is None else np.polynomial.polynomial.polyval(_vertex(draws, limits), draws.T, tensor=False)
    slope, offset = np.polyfit(x - x.mean(), np.log(points.tokens), 1)
    gradient = np.array([0.0, 1.0, 2 * vertex]) / (2 * coefficients[2])
    made = Parabola(
        points=points,
        flops=float(np.median(points.flops)),
        centre=float(np.exp(x.mean())),
        coefficients=coefficients,
        params=float(np.exp(x.mean() + vertex)),
        tokens=float(np.exp(offset + slope * vertex)),
        error=float(np.sqrt(gradient @ inverse @ gradient)),
        loss=float(np.polynomial.polynomial.polyval(vertex, coefficients)),
        inside=bool(coefficients[2] > 0 and limits[0] < vertex < limits[1]),
        params_interval=Interval.of(sizes) if draws is not None else None,
        loss_interval=Interval.of(losses) if losses is not None else None,
    )
    return made, sizes


def _vertex(coefficients: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return where parabolas `[K, 3]` are least, `[K]`, no further than a factor of 10 from the sizes that were run."""
    _, slope, curvature = coefficients.T
    far = -np.sign(slope) * np.inf
    vertex = np.where(curvature > 0, -slope / (2 * np.where(curvature > 0, curvature, 1.0)), far)
    return np.clip(vertex, limits[0] - _MARGIN, limits[1] + _MARGIN)
