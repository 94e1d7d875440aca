from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.scaling.analysis import Analysis, analyse
from hopescale.scaling.law import Law
from hopescale.scaling.next_runs import DECAY, describe_proposal, propose
from hopescale.scaling.points import Points, Table
from tests.unit.scaling.conftest import REPLICATION

BETTER = Law(E=1.8172, A=400.0, alpha=0.3478, B=1700.0, beta=0.3658)
NOISE = 0.004


@pytest.fixture(scope="module")
def analysis(isoflop_runs) -> Analysis:
    """Two series of four sizes at three budgets, which tell little."""
    shape = {"budgets": 3, "sizes": 4, "noise": NOISE}
    series = {"hope": isoflop_runs(BETTER, seed=3, **shape), "transformer": isoflop_runs(seed=4, **shape)}
    return analyse(Table(series, [], Path("runs.csv")), resamples=100)


@pytest.mark.parametrize("question", ["exponent", "size", "loss", "multiplier"])
def test_each_run_leaves_less_of_the_interval_and_all_cost_no_more_than_the_budget(analysis, question):
    found = propose(analysis, question, 1e22, most=4)
    lefts = [1.0, *(run.left for run in found.runs)]
    assert len(found.runs) == 4 and all(later < earlier for earlier, later in zip(lefts, lefts[1:], strict=False))
    assert found.spent == pytest.approx(sum(run.flops for run in found.runs)) and found.spent <= 1e22
    before, after = (np.diff(np.array([one.low, one.high]))[0] for one in (found.before, found.after))
    assert found.before.low <= found.value <= found.before.high and after < before
    assert {run.series for run in found.runs} <= ({"hope", "transformer"} if question == "multiplier" else {"hope"})
    assert len(describe_proposal(found, {"hope": lambda params, tokens: ", lr 0.1"})) == 6


def test_runs_that_are_proposed_do_shrink_the_interval(analysis):
    """They are made, with noise, and the law is fitted again."""
    found = propose(analysis, "size", 2e22, flops=1e23, series="transformer", most=6)
    params, tokens = (np.array([getattr(run, name) for run in found.runs]) for name in ("params", "tokens"))
    known, ratios = analysis.series["transformer"], []
    for seed in range(4):
        noise = NOISE * np.random.default_rng(seed).standard_normal(len(params))
        new = (params, tokens, 6 * params * tokens, REPLICATION.loss(params, tokens) * np.exp(noise))
        old = (known.points.params, known.points.tokens, known.points.flops, known.points.loss)
        both = Points(*(np.concatenate(columns) for columns in zip(old, new, strict=True)))
        again = analyse(Table({"transformer": both}, [], Path("runs.csv")), resamples=100).series["transformer"]
        before, after = ([np.log(law.optimal(1e23)[0]) for law in one.frontier.samples] for one in (known, again))
        ratios.append(np.std(after) / np.std(before))
    left = found.runs[-1].left
    assert left < 0.8 and 0.5 * left < np.median(ratios) < min(1.0, 1.6 * left)


def test_horizons_that_branch_cost_less(analysis):
    found = propose(analysis, "loss", 1e22, branch=True, most=8)
    sizes = {run.params: [other.flops for other in found.runs if other.params == run.params] for run in found.runs}
    assert max(map(len, sizes.values())) > 1
    assert found.spent == pytest.approx(sum(max(one) + DECAY * (sum(one) - max(one)) for one in sizes.values()))


@pytest.mark.parametrize(
    ("question", "budget", "series", "message"),
    [
        ("size", 1e15, None, "buy none of the runs"),
        ("size", 1e22, "titans", "there is no series titans"),
        ("multiplier", 1e22, "transformer", "needs a series and another as its reference"),
    ],
)
def test_questions_without_an_answer_are_refused(analysis, question, budget, series, message):
    with pytest.raises(DataError, match=message):
        propose(analysis, question, budget, series=series)


def test_a_budget_may_buy_runs_of_one_series_alone(analysis):
    dear = analysis.series["transformer"]
    points = replace(dear.points, params=1e7 * dear.points.params)
    both = replace(analysis, series={**analysis.series, "transformer": replace(dear, points=points)})
    found = propose(both, "multiplier", float(analysis.series["hope"].points.flops.max()))
    assert {run.series for run in found.runs} == {"hope"}
