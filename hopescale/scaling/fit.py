"""Fit `L = E + A/N^alpha + B/D^beta` to tables of runs, many weightings and many starts at once.

The fit minimises the mean Huber loss of the residuals of log loss (Hoffmann et al., arXiv 2203.15556, Eq. 3). With
`delta` below the noise that is close to their mean size, so a few runs that went wrong weigh little. It is done by
variable projection: only `alpha` and `beta` are searched for; after every step the three terms' sizes follow from
them, by a problem with one minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import plural
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points

DELTA = 1e-3
"""Size of a residual of log loss from which on it counts linearly."""

EXPONENTS = (0.05, 1.5)
"""Least and greatest exponent that a fit may find."""

LEAST_TERM = 1e-3
"""Least size of each of the law's three terms, at the runs' mean size and tokens, as a part of the lowest loss."""

ENOUGH = "it needs 6 runs of 3 sizes and 3 numbers of tokens, and better 4 sizes at each of 3 budgets or more"
"""What a law of one series needs."""

_STARTS = (0.06, 0.12, 0.2, 0.3, 0.42, 0.6, 0.85, 1.3)
_MAX_STEPS = 300
_PROJECTIONS = 2
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Fit:
    """A law and how well it describes the runs it was fitted to."""

    law: Law
    residuals: np.ndarray
    """Log of observed over predicted loss of each run, `[n]`."""
    objective: float
    """Mean Huber loss."""
    undetermined: list[str]
    """Numbers at the end of what they may be: the runs do not tell them."""
    asymptote: float | None = None
    """Value that `E` was held at; None where it was fitted."""


def fit_law(points: Points, asymptote: float | None = None) -> Fit:
    """Fit the law from 64 starts and keep the best; the same runs give the same law.

    Args:
        points: Runs.
        asymptote: Value that `E` is held at, nats per token; None fits it.

    Raises:
        DataError: If the runs are too few, or of too few sizes or durations, to determine five numbers, or one of them
            is no worse than the asymptote.
    """
    _require_enough(points)
    require_below(points, asymptote)
    starts = grid_of_starts(_STARTS)
    solutions, objectives = fit_many(points, np.tile(points.counts, (len(starts), 1)), starts, asymptote)
    best = solutions[np.argmin(objectives)]
    law = Law(*best.tolist())
    residuals = np.log(points.loss) - np.log(law.loss(points.params, points.tokens))
    undetermined = [name for name in _at_bound(law, points) if name != "E" or asymptote is None]
    return Fit(law, residuals, float(objectives.min()), undetermined, asymptote)


def grid_of_starts(exponents: Sequence[float]) -> np.ndarray:
    """Return all pairs of exponents to start from, `[K, 2]`."""
    return np.stack([axis.ravel() for axis in np.meshgrid(exponents, exponents)], axis=1)


def require_below(points: Points, asymptote: float | None) -> None:
    """Refuse an asymptote that is not above 0 and below the loss of every run."""
    least = float(points.loss.min())
    if asymptote is not None and not 0 < asymptote < least:
        message = f"the asymptote is {asymptote:g}, but the lowest loss of the runs is {least:.4g}"
        raise DataError(message, "give one above 0 and below it")


def _at_bound(law: Law, points: Points) -> list[str]:
    """Return the numbers of a law that lie at the end of their range."""
    exponents = {"alpha": law.alpha, "beta": law.beta}
    means = np.exp(np.log(points.params).mean()), np.exp(np.log(points.tokens).mean())
    terms = {"E": law.E, "A": law.A * means[0] ** -law.alpha, "B": law.B * means[1] ** -law.beta}
    low, high = EXPONENTS
    ends = [name for name, value in exponents.items() if not low * 1.001 < value < high / 1.001]
    return [name for name, value in terms.items() if value < 1.001 * LEAST_TERM * points.loss.min()] + ends


def _require_enough(points: Points) -> None:
    """Refuse runs that five numbers cannot be told from."""
    if lacking := too_few(points.params, points.tokens):
        raise DataError(lacking, ENOUGH)


def too_few(params: np.ndarray, tokens: np.ndarray) -> str | None:
    """Say that five numbers cannot be told from runs of these sizes and tokens, both `[n]`; None where they can."""
    sizes, durations = num_distinct(params), num_distinct(tokens)
    if len(params) >= 6 and sizes >= 3 and durations >= 3:
        return None
    counted = f"{plural(len(params), 'run')} of {plural(sizes, 'size')} and {plural(durations, 'number')} of tokens"
    return f"{counted} are too few for a law of 5 numbers"


def num_distinct(values: np.ndarray) -> int:
    """Count values that differ by more than 1 %."""
    return 1 + int(np.sum(np.diff(np.log(np.sort(values))) > 0.01))


def fit_many(
    points: Points, weights: np.ndarray, exponents: np.ndarray, asymptote: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit one law per row of weights, each from its own start.

    Args:
        points: Runs.
        weights: Weight of each run in each fit, `[K, n]`, not negative.
        exponents: `alpha` and `beta` to start from, `[K, 2]`.
        asymptote: Value that `E` is held at, below every loss; None fits it.

    Returns:
        `E A alpha B beta`, `[K, 5]`, and the mean Huber loss of each, `[K]`.
    """
    problem = _Problem(points, weights / weights.sum(axis=1, keepdims=True), asymptote is not None)
    theta = np.log(np.clip(exponents, *EXPONENTS))
    kappa = np.full((len(theta), 3), np.log(points.loss.min() / 3))
    if asymptote is not None:
        kappa[:, 0] = np.log(asymptote)
    for _ in range(20):
        kappa = problem.project(theta, kappa, problem.weights)
    objective = problem.objective(theta, kappa, problem.weights)
    damping = np.ones(len(theta))
    active = np.arange(len(theta))
    for _ in range(_MAX_STEPS):
        rows = problem.weights[active]
        new_theta, new_kappa = problem.step(theta[active], kappa[active], rows, damping[active])
        new_objective = problem.objective(new_theta, new_kappa, rows)
        better = new_objective < objective[active]
        moved = np.abs(new_theta - theta[active]).max(axis=1)
        taken = active[better]
        theta[taken], kappa[taken], objective[taken] = new_theta[better], new_kappa[better], new_objective[better]
        damping[active] = np.clip(damping[active] * np.where(better, 0.4, 5.0), 1e-3, 1e6)
        active = active[(moved > _TOLERANCE) & (damping[active] < 1e6)]
        if not len(active):
            break
    return problem.laws(theta, kappa), objective


class _Problem:
    """The fits of one table, with sizes and tokens about their geometric means so that the five numbers are apart.

    `theta` `[K, 2]` is the log of the exponents, `kappa` `[K, 3]` the log of the three terms at the means.
    """

    def __init__(self, points: Points, weights: np.ndarray, holds_asymptote: bool = False):
        self.holds_asymptote = holds_asymptote
        self.log_params, self.log_tokens = np.log(points.params), np.log(points.tokens)
        self.means = self.log_params.mean(), self.log_tokens.mean()
        self.x, self.y = self.log_params - self.means[0], self.log_tokens - self.means[1]
        self.log_loss = np.log(points.loss)
        self.least = np.log(LEAST_TERM * points.loss.min())
        self.weights = weights

    def terms(self, theta: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each term's share of the prediction, `[K, n, 3]`, and predicted less observed log loss, `[K, n]`."""
        alpha, beta = np.exp(theta).T[..., None]
        logs = np.stack([np.zeros_like(alpha * self.x), -alpha * self.x, -beta * self.y], axis=-1) + kappa[:, None, :]
        top = logs.max(axis=-1, keepdims=True)
        shares = np.exp(logs - top)
        total = shares.sum(axis=-1, keepdims=True)
        return shares / total, (top + np.log(total))[..., 0] - self.log_loss

    def objective(self, theta: np.ndarray, kappa: np.ndarray, weights: np.ndarray) -> np.ndarray:
        size = np.abs(self.terms(theta, kappa)[1])
        huber = np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
        return np.sum(weights * huber, axis=1)

    def project(self, theta: np.ndarray, kappa: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Move the three terms towards their best for these exponents: one reweighted least-squares step."""
        shares, residual = self.terms(theta, kappa)
        step = huber_step(self._free(shares), residual, weights, damping=1.0)
        return np.where(step == 0, kappa, np.maximum(kappa + step, self.least))

    def _free(self, shares: np.ndarray) -> np.ndarray:
        """Return the slopes by the terms that may move: an asymptote that is held has none, and takes no step."""
        return shares * np.array([0.0, 1.0, 1.0]) if self.holds_asymptote else shares

    def step(
        self, theta: np.ndarray, kappa: np.ndarray, weights: np.ndarray, damping: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move the exponents along the projected problem's gradient, then let the terms follow."""
        shares, residual = self.terms(theta, kappa)
        alpha, beta = np.exp(theta).T[..., None]
        slopes = np.stack([-alpha * self.x * shares[..., 1], -beta * self.y * shares[..., 2]], axis=-1)
        move = huber_step(np.concatenate([self._free(shares), slopes], axis=-1), residual, weights, damping[:, None])
        theta = np.clip(theta + move[:, 3:], *np.log(EXPONENTS))
        kappa = kappa + move[:, :3]
        for _ in range(_PROJECTIONS):
            kappa = self.project(theta, kappa, weights)
        return theta, kappa

    def laws(self, theta: np.ndarray, kappa: np.ndarray) -> np.ndarray:
        exponents = np.exp(theta)
        scales = np.exp(kappa[:, 1:] + exponents * np.array(self.means))
        return np.stack([np.exp(kappa[:, 0]), scales[:, 0], exponents[:, 0], scales[:, 1], exponents[:, 1]], axis=1)


def huber_step(
    slopes: np.ndarray, residual: np.ndarray, weights: np.ndarray, damping: np.ndarray | float
) -> np.ndarray:
    """Return a step on the Huber loss, `[K, p]`, from the slopes of the residuals, `[K, n, p]`.

    Its Hessian counts the runs within `DELTA`. To this are added, times the damping, the weights of the parabola that
    lies above the Huber loss and touches it at each residual: with a damping of 1 or more no step leads upwards.
    """
    size = np.maximum(np.abs(residual), 1e-300)
    above = np.minimum(1.0, DELTA / size)
    curvature = weights * ((size < DELTA) + damping * above)
    hessian = np.swapaxes(slopes, 1, 2) @ (slopes * curvature[..., None])
    gradient = np.einsum("knp,kn->kp", slopes, weights * above * residual)
    hessian += 1e-12 * np.eye(slopes.shape[-1])
    return np.clip(np.linalg.solve(hessian, -gradient[..., None])[..., 0], -1.0, 1.0)
