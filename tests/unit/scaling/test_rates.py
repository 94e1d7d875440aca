from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.scaling.fit import fit_law
from hopescale.scaling.next_runs import best_settings
from hopescale.scaling.points import Points, read_points
from hopescale.scaling.rates import TunedRuns, describe_rates, fit_rates, rates_of, read_tuned, weigh_undertuned

CURVATURE = 0.02


def best_rate(params, tokens, batch):
    return 0.05 * (params / 1e5) ** -0.3 * (tokens / 1e6) ** -0.1 * (batch / 1024) ** 0.4


def best_batch(tokens):
    return 900 * (tokens / 4e6) ** 0.3


def design(batches=(512, 1024, 2048), noise=1e-3, seed=0, factors=(0.35, 0.7, 1.4, 2.8)) -> TunedRuns:
    """Runs of a series whose loss is a parabola about a known rate and batch."""
    rng, rows = np.random.default_rng(seed), []
    for params, tokens in ((1e5, 2e6), (1e5, 8e6), (4e5, 4e6), (4e5, 3e7)):
        for batch in batches:
            for factor in factors:
                lr = 0.03 * factor * (params / 1e5) ** -0.25
                far = CURVATURE * np.log(lr / best_rate(params, tokens, batch)) ** 2
                far += 0.01 * np.log(batch / best_batch(tokens)) ** 2 if len(batches) > 1 else 0
                loss = 3 * (params * tokens**2 / 1e17) ** -0.03 * np.exp(far + noise * rng.standard_normal())
                rows.append((len(rows) + 2, params, tokens, batch, lr, loss))
    return TunedRuns(*np.array(rows, dtype=float).T)


def test_a_law_of_rate_and_batch_is_found_again():
    law = fit_rates(design(noise=0.0))
    assert law.lr.exponents == pytest.approx({"N": -0.3, "D": -0.1, "batch": 0.4}, abs=1e-6)
    assert law.batch.exponents == pytest.approx({"N": 0, "D": 0.3}, abs=1e-6)
    assert law.curvature == pytest.approx(CURVATURE) and law.noise < 1e-9
    assert law.lr(np.array([2e5]), np.array([5e6]), np.array([700])) == pytest.approx(best_rate(2e5, 5e6, 700))
    assert law.batch(np.array([2e5]), np.array([5e6]), np.array([1.0])) == pytest.approx(best_batch(5e6))


def test_intervals_of_rates_hold_the_truth():
    inside = []
    for seed in range(40):
        law = fit_rates(design(batches=(1024,), noise=2e-3, seed=seed))
        assert law.batch is None and law.lr.exponents.keys() == {"N", "D"}
        interval = law.lr.intervals["N"]
        inside.append(interval.low <= -0.3 <= interval.high)
    assert np.mean(inside) >= 0.8 and 0.05 < interval.high - interval.low < 0.5


def test_rates_that_hold_for_every_size_have_a_law_without_the_size():
    law = fit_rates(design(batches=(1024,)), transfer=True)
    assert law.lr.exponents.keys() == {"D"}


def test_sizes_with_tokens_in_proportion_cannot_tell_them_apart():
    runs = design(batches=(1024,))
    chosen = runs.take(np.isin(runs.tokens, (2e6, 4e6)))
    assert fit_rates(chosen).lr.exponents.keys() == {"N"}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (design(factors=(0.7, 1.4)), "no size has three learning rates"),
        (design(batches=(1024,), factors=(0.5, 0.7, 1.0)).take(slice(0, 3)), "too few for the 3 numbers"),
        (design(batches=(1024,), factors=(0.2, 0.3, 0.4)), "no size has its best learning rate among .* to 0.012"),
    ],
)
def test_designs_that_do_not_tell_a_best_rate_are_refused(runs: TunedRuns, message: str):
    with pytest.raises(DataError, match=message):
        fit_rates(runs)


def test_sizes_whose_best_rate_was_not_run_are_named():
    runs = design(batches=(1024,), noise=0, factors=(0.2, 0.3, 0.45, 0.7, 1.4, 2.8))
    runs = runs.take((runs.params < 2e5) | (runs.lr < 0.8 * best_rate(runs.params, runs.tokens, runs.batch)))
    law = fit_rates(runs)
    assert {one.params for one in law.outside} == {4e5} and all(one.best > one.high for one in law.outside)
    points = Points(runs.params, runs.tokens, runs.params * runs.tokens, runs.loss, rows=runs.rows)
    said = [line for line in describe_rates("hope", runs, law, points) if "outside those that were run" in line]
    assert len(said) == len(law.outside) and said[0].startswith("  N 400k, D 4M: the best rate is 0.0287, outside")
    assert not fit_rates(design()).outside


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of a design, and of two more sizes at one rate each, one of them far too low."""
    runs, rows = design(batches=(1024,), noise=0), []
    for _, params, tokens, batch, lr, loss in np.array(list(vars(runs).values())).T.tolist():
        rows.append([params, tokens, lr, batch, loss])
    for params, factor in ((1.6e6, 1.1), (2.5e6, 0.1)):
        for tokens in (1e7, 4e7):
            lr = factor * best_rate(params, tokens, 1024)
            loss = 3 * (params * tokens**2 / 1e17) ** -0.03 * np.exp(CURVATURE * np.log(factor) ** 2)
            rows.append([params, tokens, lr, 1024, loss])
    with (tmp_path / "runs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["N", "D", "learning_rate", "batch_tokens", "loss"], *rows])
    return tmp_path / "runs.csv"


def test_undertuned_runs_are_named_and_count_less(table: Path):
    read = read_points(table)
    assert len(read.finished) == 20 and len(read.series["all"]) == 8
    assert sum("is the best of its size and tokens" in line for line in read.left_out) == 12
    (runs, law) = rates_of(read)["all"]
    said = describe_rates("all", runs, law, read.series["all"])
    assert [line[:8] for line in said if line.startswith("  row")] == ["  row 20", "  row 21"]
    assert any(line.startswith("  row 20: its rate is 0.1 times the best, and costs 11 %") for line in said)
    assert any(line.startswith("  optim.lr: ") and " * N ** -0.3" in line for line in said)
    weighed, found = weigh_undertuned(read)
    assert found["all"].keys() == {20, 21} and weighed.series["all"].weights[-1] < 0.01
    truth = fit_law(read.series["all"].take(np.arange(6)))
    laws = [fit_law(points).law for points in (weighed.series["all"], read.series["all"])]
    errors = [abs(np.log(law.loss(5e6, 1e8) / truth.law.loss(5e6, 1e8))) for law in laws]
    assert errors[0] < 0.3 * errors[1]


def test_runs_of_one_size_whose_steps_end_otherwise_are_one(tmp_path: Path):
    (tmp_path / "runs.csv").write_text(
        "N,D,loss,batch\n1e6,1000000,3.1,1000\n1e6,1003000,3.0,3000\n1e6,1200000,2.9,1000\n"
    )
    table = read_points(tmp_path / "runs.csv")
    assert table.series["all"].loss.tolist() == [3.0, 2.9] and "row 2: loss 3.1, but row 3" in table.left_out[0]


def test_runs_that_went_back_to_a_lower_rate_tell_nothing_of_theirs(tmp_path: Path):
    (tmp_path / "runs.csv").write_text(
        "N,D,loss,lr,rate_factor\n1e6,1e6,3.1,0.01,1\n1e6,1e6,3,0.1,0.25\n1e6,1e6,3,0.2,\n"
    )
    table = read_points(tmp_path / "runs.csv")
    assert len(table.finished) == 3 and read_tuned(table)["all"].lr.tolist() == [0.01, 0.2]


def test_a_table_without_rates_is_said(tmp_path: Path):
    (tmp_path / "runs.csv").write_text("N,D,loss\n1e6,1000000,3.1\n")
    with pytest.raises(DataError, match="has no column for lr, only N, D, loss"):
        rates_of(read_points(tmp_path / "runs.csv"))


def test_a_damaged_batch_is_said(tmp_path: Path):
    (tmp_path / "runs.csv").write_text("N,D,loss,lr,batch\n1e6,1000000,3.1,0.01,512\n1e6,1000000,3.2,0.02,0\n")
    read = read_points(tmp_path / "runs.csv")
    for use in (read_tuned, best_settings):
        with pytest.raises(DataError, match="column batch: 0, but must be above 0"):
            use(read)
