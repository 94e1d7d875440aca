from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from hopescale.common.errors import DataError
from hopescale.scaling.bootstrap import Interval, reweighted_laws
from hopescale.scaling.fit import DELTA, fit_law, fit_many
from hopescale.scaling.law import Law
from hopescale.scaling.points import Points, read_points
from tests.unit.scaling.conftest import REPLICATION


def naive_objective(numbers: np.ndarray, points: Points, weights: np.ndarray) -> float:
    """Mean Huber loss, written out run by run; numbers are log E, log A, alpha, log B, beta."""
    total = 0.0
    for params, tokens, loss, weight in zip(points.params, points.tokens, points.loss, weights, strict=True):
        e, a, alpha, b, beta = numbers
        predicted = np.exp(e) + np.exp(a) / params**alpha + np.exp(b) / tokens**beta
        miss = abs(np.log(loss) - np.log(predicted))
        total += weight * (miss**2 / 2 if miss < DELTA else DELTA * (miss - DELTA / 2))
    return total / sum(weights)


def as_numbers(law: Law) -> np.ndarray:
    return np.array([np.log(law.E), np.log(law.A), law.alpha, np.log(law.B), law.beta])


def test_the_published_refit_of_chinchilla(chinchilla):
    law = fit_law(read_points(chinchilla, drop_highest=5).series["all"]).law.to_dict()
    published = REPLICATION.to_dict()
    for name in ("alpha", "beta", "E"):
        assert law[name] == pytest.approx(published[name], abs=0.004), name
    for name in ("A", "B"):
        assert law[name] == pytest.approx(published[name], rel=0.06), name


def test_no_point_beats_the_fit(isoflop_runs):
    points = isoflop_runs(budgets=4, sizes=5, noise=0.02)
    fit = fit_law(points)
    ones = np.ones(len(points))
    assert fit.objective == pytest.approx(naive_objective(as_numbers(fit.law), points, ones), rel=1e-9)
    for law in (fit.law, REPLICATION):
        start = as_numbers(law)
        found = minimize(naive_objective, start, args=(points, ones), method="Nelder-Mead", options={"maxiter": 600})
        assert found.fun >= fit.objective * (1 - 1e-6)


def test_weights_count_runs(isoflop_runs):
    points = isoflop_runs(budgets=4, sizes=5, noise=0.02)
    counts = np.random.default_rng(1).integers(0, 3, size=len(points))
    repeated = fit_law(points.take(np.repeat(np.arange(len(points)), counts)))
    (numbers,), (objective,) = fit_many(points, counts[None].astype(float), np.array([[0.3, 0.3]]))
    assert objective == pytest.approx(repeated.objective, rel=1e-6)
    assert numbers == pytest.approx(list(repeated.law.to_dict().values()), rel=1e-4)


@pytest.mark.parametrize(
    "law",
    [
        REPLICATION,
        Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28),
        Law(E=0.5, A=20.0, alpha=0.15, B=9000.0, beta=0.45),
        Law(E=2.5, A=5e5, alpha=0.8, B=3e3, beta=0.35),
    ],
    ids=["replication", "chinchilla", "flat", "steep"],
)
def test_a_law_without_noise_is_recovered_exactly(isoflop_runs, law):
    fit = fit_law(isoflop_runs(law, budgets=4, sizes=5))
    for name, value in law.to_dict().items():
        assert fit.law.to_dict()[name] == pytest.approx(value, rel=1e-3), name
    assert np.abs(fit.residuals).max() < 1e-6
    assert fit.undetermined == []


def test_a_few_bad_runs_weigh_little(isoflop_runs):
    points = isoflop_runs(noise=0.002)
    bad = points.loss.copy()
    bad[[3, 30, 50]] *= 1.5
    law = fit_law(Points(points.params, points.tokens, points.flops, bad)).law
    assert law.alpha == pytest.approx(REPLICATION.alpha, abs=0.02)
    assert law.beta == pytest.approx(REPLICATION.beta, abs=0.02)


def test_intervals_hold_the_law(isoflop_runs, record_testsuite_property):
    inside = dict.fromkeys(REPLICATION.to_dict(), 0)
    for seed in range(100):
        points = isoflop_runs(noise=0.01, seed=seed)
        laws = [law.to_dict() for law in reweighted_laws(points, fit_law(points), 200)]
        for name, value in REPLICATION.to_dict().items():
            interval = Interval.of(np.array([law[name] for law in laws]))
            inside[name] += interval.low <= value <= interval.high
    record_testsuite_property("seeds inside the interval, of 100", inside)
    assert min(inside.values()) >= 90, inside
    assert max(inside.values()) <= 99, f"the intervals are too wide to say anything: {inside}"


def test_the_same_runs_give_the_same_law(isoflop_runs):
    points = isoflop_runs(budgets=3, sizes=4, noise=0.01)
    first, second = fit_law(points), fit_law(points)
    assert first.law == second.law
    assert reweighted_laws(points, first, 5, seed=3) == reweighted_laws(points, second, 5, seed=3)
    assert reweighted_laws(points, first, 5, seed=3) != reweighted_laws(points, first, 5, seed=4)


def test_what_runs_cannot_tell_is_said(isoflop_runs):
    points = isoflop_runs(Law(E=1e-9, A=482.0, alpha=0.35, B=2085.0, beta=0.37), budgets=4, sizes=5)
    assert fit_law(points).undetermined == ["E"]
    beyond = isoflop_runs(Law(E=1.8, A=1e-9, alpha=0.35, B=2085.0, beta=0.37), budgets=4, sizes=5)
    assert "A" in fit_law(beyond).undetermined


@pytest.mark.parametrize(
    ("budgets", "sizes", "message"),
    [(1, 5, "5 runs of 5 sizes and 5 numbers of tokens"), (5, 1, "5 runs")],
)
def test_too_few_runs_are_refused(isoflop_runs, budgets, sizes, message):
    with pytest.raises(DataError, match=message):
        fit_law(isoflop_runs(budgets=budgets, sizes=sizes, span=2.0 if sizes > 1 else 1.0))


def test_two_sizes_are_refused(isoflop_runs):
    points = isoflop_runs()
    with pytest.raises(DataError, match="2 sizes"):
        fit_law(Points(np.where(points.params > 1e9, 1e9, 2e9), points.tokens, points.flops, points.loss))
