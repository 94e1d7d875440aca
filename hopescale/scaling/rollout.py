"""Laws held against runs that they have not seen, at every cutoff in size and in compute, and forms compared so.

At a cutoff the law is fitted to the runs up to there and predicts all larger ones. All cutoffs are fitted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import format_count
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.farseer import fit_parts, too_few_for_nine
from hopescale.scaling.fit import fit_many, grid_of_starts, require_below, too_few
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points
from hopescale.scaling.prediction import prediction_interval

By = Literal["size", "compute"]
Cutoff = tuple[By, float, np.ndarray]
"""Kind of a cutoff, its value, and the mask of the runs up to there, `[n]`."""

MOST_CUTOFFS = 6
"""Cutoffs of each kind at most; of more the evenly spread ones are taken."""

RESAMPLES = 50
_STARTS = (0.1, 0.3, 0.7)
_SAME_BUDGET = 1.02


@dataclass(frozen=True)
class Rollout:
    """One form of the law, fitted up to one cutoff."""

    by: By
    cutoff: float
    """Largest parameters or FLOPs of the runs that were fitted."""
    form: str
    num_fitted: int
    errors: np.ndarray
    """Log of observed over predicted loss of the larger runs, `[m]`."""
    inside: np.ndarray | None
    """Whether each of these lies in its prediction interval, `[m]`; None where no fits were repeated."""

    @property
    def mean_error(self) -> float:
        """Mean size of the errors of log loss."""
        return float(np.mean(np.abs(self.errors)))


def rollouts(
    points: Points, asymptote: float | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> list[Rollout]:
    """Fit every form up to every cutoff that leaves enough runs on both sides, and predict the rest.

    Forms are `E + A/N^alpha + B/D^beta` with `E` fitted (`power`), the same with `E` held (`held E`), and Farseer's
    (`farseer`) where the runs are enough for nine numbers.

    Args:
        points: Runs.
        asymptote: Value at which `held E` holds `E`, nats per token; None leaves this form out.
        resamples: Number of reweighted fits for the prediction intervals of the first two forms; 0 for none.
        seed: Seed of the weights.

    Raises:
        DataError: If no cutoff leaves enough runs, or the asymptote is not below every loss.
    """
    require_below(points, asymptote)
    cutoffs = [*_cutoffs(points, "size"), *_cutoffs(points, "compute")]
    if not cutoffs:
        raise DataError("no cutoff leaves runs for a law and larger ones to predict", "run more sizes or budgets")
    free = _power_laws(points, cutoffs, None)
    found = _rolled(points, cutoffs, "power", free, None, resamples, seed)
    if asymptote is not None:
        held = _power_laws(points, cutoffs, asymptote)
        found += _rolled(points, cutoffs, "held E", held, asymptote, resamples, seed)
    return found + _farseer(points, cutoffs, free)


def mean_errors(found: Sequence[Rollout]) -> dict[str, float]:
    """Return the mean error of log loss of each form, the best first, over the cutoffs that all of them have.

    Cutoffs count alike: those with many larger runs do not outweigh those next to the end.
    """
    forms = list(dict.fromkeys(rollout.form for rollout in found))
    errors = {form: {(r.by, r.cutoff): r.mean_error for r in found if r.form == form} for form in forms}
    shared = set.intersection(*(set(of_form) for of_form in errors.values()))
    means = {form: float(np.mean([of_form[key] for key in shared])) for form, of_form in errors.items()}
    return dict(sorted(means.items(), key=lambda item: item[1])) if shared else {}


def describe_rollouts(found: Sequence[Rollout]) -> list[str]:
    """Return lines that tell a person how far each form was off at each cutoff, and which was off least."""
    lines = []
    for by, value in dict.fromkeys((rollout.by, rollout.cutoff) for rollout in found):
        here = [rollout for rollout in found if (rollout.by, rollout.cutoff) == (by, value)]
        until = f"{format_count(value)} parameters" if by == "size" else f"{value:.2e} FLOPs"
        lines.append(f"up to {until}: {here[0].num_fitted} runs fitted, {len(here[0].errors)} predicted")
        for rollout in here:
            inside = "" if rollout.inside is None else f", {100 * rollout.inside.mean():.0f} % in their intervals"
            lines.append(
                f"  {rollout.form:<8} {100 * rollout.mean_error:.2f} % off, "
                f"{100 * rollout.errors.mean():+.2f} % on average{inside}"
            )
    if means := mean_errors(found):
        text = ", ".join(f"{form} {100 * mean:.2f} %" for form, mean in means.items())
        lines.append(f"held-out error over the cutoffs that all forms have: {text}")
    return lines


def rollouts_json(found: Sequence[Rollout]) -> dict[str, Any]:
    """Return rollouts as JSON has them."""
    return {
        "cutoffs": [
            {"by": rollout.by, "cutoff": rollout.cutoff, "form": rollout.form, "num_fitted": rollout.num_fitted}
            | {"num_predicted": len(rollout.errors), "mean_absolute_error": rollout.mean_error}
            | {"mean_error": float(rollout.errors.mean())}
            | {"inside": None if rollout.inside is None else float(rollout.inside.mean())}
            for rollout in found
        ],
        "mean_absolute_errors": mean_errors(found),
    }


def _cutoffs(points: Points, by: By) -> list[Cutoff]:
    """Return cutoffs with the mask of the runs up to each, from the first that leaves enough for a law."""
    values = points.params if by == "size" else points.flops
    margin = 1.005 if by == "size" else _SAME_BUDGET
    ends = np.sort(values)
    ends = ends[:-1][ends[1:] > margin * ends[:-1]]
    masks = [(by, float(end), values <= margin * end) for end in ends]
    masks = [item for item in masks if not too_few(points.params[item[2]], points.tokens[item[2]])]
    if len(masks) > MOST_CUTOFFS:
        masks = [masks[place] for place in np.linspace(0, len(masks) - 1, MOST_CUTOFFS).round().astype(int)]
    return masks


def _power_laws(points: Points, cutoffs: Sequence[Cutoff], asymptote: float | None) -> list[Law]:
    """Fit the law of five numbers up to each cutoff, from nine starts each."""
    starts = grid_of_starts(_STARTS)
    rows = np.repeat([mask * points.counts for _, _, mask in cutoffs], len(starts), axis=0)
    numbers, objectives = fit_many(points, rows, np.tile(starts, (len(cutoffs), 1)), asymptote)
    best = objectives.reshape(len(cutoffs), -1).argmin(axis=1) + np.arange(len(cutoffs)) * len(starts)
    return [Law(*row) for row in numbers[best].tolist()]


def _rolled(
    points: Points,
    cutoffs: Sequence[Cutoff],
    form: str,
    laws: Sequence[Law],
    asymptote: float | None,
    resamples: int,
    seed: int,
) -> list[Rollout]:
    """Hold laws against the larger runs, with intervals by reweighted fits."""
    samples: list[list[Law]] = [[] for _ in laws]
    if resamples:
        masks = np.array([mask * points.counts for _, _, mask in cutoffs])
        weights = np.random.default_rng(seed).exponential(size=(resamples, len(points)))
        weights = (masks[:, None] * weights).reshape(-1, len(points))
        start = np.repeat([[law.alpha, law.beta] for law in laws], resamples, axis=0)
        repeated = [Law(*row) for row in fit_many(points, weights, start, asymptote)[0].tolist()]
        samples = [repeated[place * resamples : (place + 1) * resamples] for place in range(len(laws))]
    return [_rollout(points, *parts, form) for parts in zip(cutoffs, laws, samples, strict=True)]


def _rollout(points: Points, cutoff: Cutoff, law: Law, samples: Sequence[Law], form: str) -> Rollout:
    by, value, mask = cutoff
    residuals = np.log(points.loss) - np.log(law.loss(points.params, points.tokens))
    larger, inside = points.take(~mask), None
    if samples:
        losses = np.array([sample.loss(larger.params, larger.tokens) for sample in samples])
        intervals = [prediction_interval(column, residuals[mask]) for column in losses.T]
        inside = np.array([_holds(interval, loss) for interval, loss in zip(intervals, larger.loss, strict=True)])
    return Rollout(by, value, form, int(mask.sum()), residuals[~mask], inside)


def _holds(interval: Interval, value: float) -> bool:
    return bool(interval.low <= value <= interval.high)


def _farseer(points: Points, cutoffs: Sequence[Cutoff], laws: Sequence[Law]) -> list[Rollout]:
    """Fit the law of nine numbers up to the cutoffs that leave enough runs for it."""
    enough = [place for place, (_, _, mask) in enumerate(cutoffs) if not too_few_for_nine(points.take(mask))]
    if not enough:
        return []
    weights = np.array([cutoffs[place][2] * points.counts for place in enough])
    fitted = fit_parts(points, weights, [laws[place] for place in enough])
    found = []
    for place, law in zip(enough, fitted, strict=True):
        by, value, mask = cutoffs[place]
        errors = np.log(points.loss) - np.log(law.loss(points.params, points.tokens))
        found.append(Rollout(by, value, "farseer", int(mask.sum()), errors[~mask], None))
    return found
