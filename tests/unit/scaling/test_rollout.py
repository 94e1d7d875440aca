from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.scaling.bootstrap import reweighted_laws
from hopescale.scaling.farseer import FarseerLaw, fit_farseer
from hopescale.scaling.fit import fit_law, fit_many
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points, read_points
from hopescale.scaling.prediction import prediction_interval
from hopescale.scaling.rollout import describe_rollouts, mean_errors, rollouts
from tests.unit.scaling.conftest import REPLICATION

BENT = np.array([0.7, -0.1, -0.3, 7.6, -0.6, 0.2, -1.0, -0.05, 0.3])


def naive_farseer(numbers: np.ndarray, centre: float, params: float, tokens: float) -> float:
    """The law as it is printed, with `a N^g + b` for each of its functions."""

    def function(value: float, slope: float, power: float) -> float:
        scale = slope / power * np.exp(-power * centre)
        return scale * params**power + value - slope / power

    asymptote, size, exponent = (function(*numbers[place : place + 3]) for place in (0, 3, 6))
    return np.exp(asymptote) + np.exp(size) * tokens ** -np.exp(exponent)


@pytest.fixture(scope="module")
def bent(isoflop_runs) -> tuple[FarseerLaw, Points]:
    """Runs of a law of nine numbers, without noise."""
    runs = isoflop_runs(budgets=5, sizes=6)
    law = FarseerLaw(BENT, float(np.log(runs.params).mean()))
    return law, Points(runs.params, runs.tokens, runs.flops, law.loss(runs.params, runs.tokens))


def test_the_second_form_is_the_printed_one(bent):
    law, points = bent
    for params, tokens, loss in zip(points.params[:5], points.tokens[:5], points.loss[:5], strict=True):
        assert loss == pytest.approx(naive_farseer(BENT, law.centre, params, tokens), rel=1e-9)


def test_the_second_form_finds_what_the_first_cannot_say(bent):
    _, points = bent
    found = fit_farseer(points)
    errors = np.abs(np.log(found.loss(points.params, points.tokens)) - np.log(points.loss))
    assert errors.max() < 2e-4 and np.abs(fit_law(points).residuals).max() > 10 * errors.max()
    with pytest.raises(DataError, match="too few for a law of 9 numbers"):
        fit_farseer(points.take(np.arange(12)))


@pytest.mark.parametrize("asymptote", [1.7, 1.9])
def test_an_asymptote_can_be_held(isoflop_runs, asymptote: float):
    points = isoflop_runs(budgets=4, sizes=5, noise=0.005)
    fit = fit_law(points, asymptote)
    assert pytest.approx(asymptote, rel=1e-12) == fit.law.E and fit.objective > fit_law(points).objective
    assert {law.E for law in reweighted_laws(points, fit, 3, asymptote=asymptote)} == {fit.law.E}
    (free,), (objective,) = fit_many(points, np.ones((1, len(points))), np.array([[fit.law.alpha, fit.law.beta]]), 1.8)
    assert free[0] == pytest.approx(1.8) and objective > 0


def test_an_asymptote_above_a_loss_is_refused(isoflop_runs):
    points = isoflop_runs(budgets=4, sizes=5)
    with pytest.raises(DataError, match="the asymptote is 3, but the lowest loss of the runs is 2.141"):
        fit_law(points, 3.0)


def test_laws_of_runs_without_noise_predict_the_larger_runs(isoflop_runs):
    points = isoflop_runs(budgets=4, sizes=5, span=8.0)
    found = rollouts(points, asymptote=1.5, resamples=0)
    power = [rollout for rollout in found if rollout.form == "power"]
    assert {rollout.by for rollout in power} == {"size", "compute"}
    assert all(rollout.num_fitted + len(rollout.errors) == len(points) for rollout in found)
    late = [rollout for rollout in power if rollout.num_fitted >= 10]
    assert late and max(rollout.mean_error for rollout in late) < 1e-4
    errors = mean_errors(found)
    assert errors["power"] < 0.1 * errors["held E"], "a wrong asymptote is seen in the runs that were held out"
    assert describe_rollouts(found)[-1].startswith("held-out error over the cutoffs that all forms have: ")


def covered(make, seeds: range) -> float:
    """Return the share of larger runs of random surfaces that lie in the prediction intervals of their law."""
    inside = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        alpha, beta = rng.uniform(0.25, 0.45, size=2)
        low = Law(rng.uniform(1.2, 2.2), 0.4 * 3e8**alpha, alpha, 0.4 * 6e9**beta, beta)
        points = make(low, budgets=6, sizes=5, noise=0.01, seed=seed)
        known = points.flops < 0.9 * points.flops.max()
        fitted, larger = points.take(known), points.take(~known)
        fit = fit_law(fitted)
        laws = reweighted_laws(fitted, fit, 100, seed)
        interval = prediction_interval([law.loss(larger.params[2], larger.tokens[2]) for law in laws], fit.residuals)
        inside.append(interval.low <= larger.loss[2] <= interval.high)
    return float(np.mean(inside))


def test_prediction_intervals_hold_larger_runs(isoflop_runs):
    assert covered(isoflop_runs, range(100, 112)) >= 0.75


@pytest.mark.nightly
def test_prediction_intervals_hold_between_90_and_98_of_100(isoflop_runs, record_testsuite_property):
    share = covered(isoflop_runs, range(100))
    record_testsuite_property("larger runs in their prediction intervals, of 100", share)
    assert 0.90 <= share <= 0.98


def test_a_prediction_interval_holds_the_noise_of_runs(isoflop_runs):
    points = isoflop_runs(noise=0.02)
    fit = fit_law(points)
    same = [REPLICATION.loss(1e9, 2e10)] * 50
    interval = prediction_interval(same, fit.residuals)
    assert 0.06 < np.log(interval.high / interval.low) < 0.1


@pytest.mark.parametrize(
    ("table", "series", "cutoff", "most"),
    [("chinchilla_figure4", "all", 4.72e20, 0.011), ("overtraining_c4", "rpj", 1.02e19, 0.01)],
)
def test_published_tables_are_predicted_from_their_smaller_runs(table: str, series: str, cutoff: float, most: float):
    folder, highest = Path(__file__).parent / "data", 5 if series == "all" else 0
    found = rollouts(read_points(folder / f"{table}.csv", None, highest).series[series], resamples=0)
    (rollout,) = [r for r in found if r.by == "compute" and r.form == "power" and 0.99 < r.cutoff / cutoff < 1.01]
    assert rollout.mean_error < most
