"""IsoFLOP parabolas, the lower envelope, the forecast of the largest runs, and multipliers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hopescale.scaling.bootstrap import forecast_largest, reweighted_laws
from hopescale.scaling.fit import fit_law
from hopescale.scaling.law import Law
from hopescale.scaling.multiplier import Frontier, multiplier
from hopescale.scaling.points import Points, read_points
from hopescale.scaling.views import fit_isoflop, lower_envelope, runs_by_budget
from tests.unit.scaling.conftest import REPLICATION

GROWTH = REPLICATION.beta / (REPLICATION.alpha + REPLICATION.beta)


def test_isoflop_minima_without_noise(isoflop_runs):
    found = fit_isoflop(isoflop_runs(span=3.0), 200)
    assert len(found.parabolas) == 7
    for parabola in found.parabolas:
        params, tokens = REPLICATION.optimal(parabola.flops)
        assert parabola.inside
        assert parabola.params == pytest.approx(params, rel=0.02)
        assert parabola.tokens == pytest.approx(tokens, rel=0.02)
        assert parabola.loss == pytest.approx(REPLICATION.loss(params, tokens), rel=1e-3)
    assert found.params.exponent == pytest.approx(GROWTH, abs=5e-3)
    assert found.tokens.exponent == pytest.approx(1 - GROWTH, abs=5e-3)
    assert found.params(1e21) == pytest.approx(REPLICATION.optimal(1e21)[0], rel=0.02)


def test_isoflop_intervals_hold_the_minimum(isoflop_runs):
    sizes = losses = growth = 0
    for seed in range(100):
        found = fit_isoflop(isoflop_runs(budgets=3, sizes=5, noise=0.003, seed=seed), 400)
        parabola = found.parabolas[1]
        params, tokens = REPLICATION.optimal(parabola.flops)
        sizes += parabola.params_interval.low <= params <= parabola.params_interval.high
        losses += parabola.loss_interval.low <= REPLICATION.loss(params, tokens) <= parabola.loss_interval.high
        growth += found.params.interval.low <= GROWTH <= found.params.interval.high
    assert 90 <= sizes <= 99 and 90 <= losses <= 99 and 90 <= growth <= 99, (sizes, losses, growth)


def test_three_sizes_have_a_minimum_and_no_interval(isoflop_runs):
    found = fit_isoflop(isoflop_runs(budgets=2, sizes=3, span=2.0), 200)
    assert [parabola.params_interval for parabola in found.parabolas] == [None, None]
    assert found.params.interval is None
    assert found.params.exponent == pytest.approx(GROWTH, abs=0.01)


def test_a_minimum_beyond_the_sizes_is_no_minimum(isoflop_runs):
    points = isoflop_runs(budgets=2, sizes=9)
    small = points.params < np.array([0.6 * REPLICATION.optimal(flops)[0] for flops in points.flops])
    found = fit_isoflop(points.take(small), 0)
    assert [parabola.inside for parabola in found.parabolas] == [False, False]
    assert found.params is None and found.tokens is None


def test_budgets_are_found_in_scattered_flops(chinchilla, isoflop_runs):
    points = isoflop_runs(budgets=5, sizes=4)
    shaken = points.flops * np.random.default_rng(0).uniform(0.95, 1.05, len(points))
    groups = runs_by_budget(Points(points.params, points.tokens, shaken, points.loss))
    assert [len(group) for group in groups] == [4] * 5
    assert [group.flops.mean() for group in groups] == pytest.approx(np.geomspace(1e19, 1e22, 5), rel=0.05)
    medians = [np.median(group.flops) for group in runs_by_budget(read_points(chinchilla).series["all"])]
    for budget in (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21):
        assert min(abs(math.log(median / budget)) for median in medians) < math.log(1.12), budget


def test_the_envelope_is_what_no_cheaper_run_beats(isoflop_runs):
    points = isoflop_runs(budgets=5, sizes=9, noise=0.005)
    kept = [
        run
        for run in range(len(points))
        if not any(
            points.loss[other] <= points.loss[run] and points.flops[other] <= points.flops[run]
            for other in range(len(points))
            if other != run
        )
    ]
    envelope = lower_envelope(points)
    assert sorted(envelope.points.loss) == sorted(points.loss[kept])
    assert (np.diff(envelope.points.flops) > 0).all()


def test_the_envelope_grows_as_the_law_says(isoflop_runs):
    envelope = lower_envelope(isoflop_runs(budgets=9, sizes=9))
    assert envelope.params.exponent == pytest.approx(GROWTH, abs=0.01)
    assert envelope.tokens.exponent == pytest.approx(1 - GROWTH, abs=0.01)


def test_the_largest_runs_are_forecast(isoflop_runs):
    points = isoflop_runs()
    forecast = forecast_largest(points)
    assert len(forecast.errors) == 9 and forecast.flops == pytest.approx(1e22)
    assert np.abs(forecast.errors).max() < 1e-6
    worse = points.loss * np.where(points.flops > 9e21, 1.02, 1.0)
    errors = forecast_largest(Points(points.params, points.tokens, points.flops, worse)).errors
    assert errors == pytest.approx(np.full(9, np.log(1.02)), abs=1e-5)


def test_nothing_is_forecast_from_too_few_runs(isoflop_runs):
    assert forecast_largest(isoflop_runs(budgets=2, sizes=4)) is None


def frontier(points: Points, seed: int = 0, count: int = 100) -> Frontier:
    fit = fit_law(points)
    return Frontier(fit.law, reweighted_laws(points, fit, count, seed), points.cost())


def scaled(law: Law, times: float) -> Law:
    """Return the law of a series that does with `C` what `law` does with `times C`."""
    ratio = times**0.5
    return Law(law.E, law.A / ratio**law.alpha, law.alpha, law.B / ratio**law.beta, law.beta)


@pytest.mark.parametrize("times", [0.5, 1.0, 1.7, 4.0])
def test_a_known_multiplier_is_recovered(isoflop_runs, times):
    better = frontier(isoflop_runs(scaled(REPLICATION, times)), count=0)
    reference = frontier(isoflop_runs(), count=0)
    for flops in (1e19, 3e20, 1e22):
        found = multiplier(better, reference, flops)
        assert found.value == pytest.approx(times, rel=1e-3)
        assert found.interval is None
        assert multiplier(reference, better, flops * times).value == pytest.approx(1 / times, rel=1e-3)


def test_dear_tokens_count_against_a_series(isoflop_runs):
    dear = frontier(isoflop_runs(cost=9.0), count=0)
    assert multiplier(dear, frontier(isoflop_runs(), count=0), 1e20).value == pytest.approx(6 / 9, rel=1e-3)


def test_what_small_models_cost_more_is_counted(isoflop_runs):
    points = isoflop_runs()
    flops = points.flops * (points.params / 1e9) ** -0.2
    runs = frontier(Points(points.params, points.tokens, flops, points.loss), count=0)
    params, tokens = runs.law.optimal(1e20, runs.cost)
    assert 6 * params**0.8 * tokens * 1e9**0.2 == pytest.approx(1e20, rel=1e-6)
    for factor in (0.9, 1.1):
        assert REPLICATION.loss(params * factor, tokens / factor**0.8) > runs.law.best_loss(1e20, runs.cost)


def test_a_loss_below_the_references_e_is_never_reached(isoflop_runs):
    better = frontier(isoflop_runs(Law(1.2, *list(REPLICATION.to_dict().values())[1:])), count=5)
    found = multiplier(better, frontier(isoflop_runs(), count=5), 1e22)
    assert found.loss < REPLICATION.E
    assert found.value == math.inf and found.interval.high == math.inf


def test_a_loss_barely_above_the_references_e_is_never_reached():
    assert Law(E=2.0, A=5.0, alpha=0.05, B=5.0, beta=0.05).flops_for(2.0 + 1e-12) == math.inf


def test_intervals_hold_the_multiplier(isoflop_runs):
    inside = 0
    for seed in range(40):
        better = isoflop_runs(scaled(REPLICATION, 1.7), budgets=4, sizes=4, noise=0.01, seed=seed)
        reference = isoflop_runs(budgets=4, sizes=4, noise=0.01, seed=1000 + seed)
        found = multiplier(frontier(better, seed=0), frontier(reference, seed=1), 3e20)
        inside += found.interval.low <= 1.7 <= found.interval.high
    assert inside >= 35, inside
