"""Scores beside losses: the curve that made them is found again, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hopescale.cli.app import app
from hopescale.common.errors import DataError
from hopescale.scaling.analysis import Analysis, analyse
from hopescale.scaling.points import Points, read_points
from hopescale.scaling.report import write_report
from hopescale.scaling.scores import ScoreAnalysis, ScoreCurve, fit_curves
from hopescale.scaling.summary import describe, to_json

CURVE = ScoreCurve(floor=0.1, gain=4.0, rate=0.9)
SHIFT = 0.05
"""What Hope scores above the Transformer at equal loss."""


def write_table(path: Path, series: dict[str, Points], noise: float = 0.0, percent: bool = False) -> Path:
    """Write runs with the scores of `CURVE`, those of `hope` shifted, one cell left empty."""
    random, lines = np.random.default_rng(5), ["series,N,D,FLOP,loss,score"]
    for name, points in series.items():
        scores = CURVE(points.loss) + SHIFT * (name == "hope") + noise * random.standard_normal(len(points))
        cells = [f"{100 * score if percent else score:.6f}" for score in scores]
        cells[0] = ""
        columns = points.params, points.tokens, points.flops, points.loss
        rows = zip(*(column.tolist() for column in columns), cells, strict=True)
        lines += [",".join(map(str, (name, *row))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory, isoflop_runs) -> Analysis:
    shape = {"budgets": 3, "sizes": 4, "noise": 0.003}
    series = {"hope": isoflop_runs(seed=1, **shape), "transformer": isoflop_runs(seed=2, **shape)}
    path = write_table(tmp_path_factory.mktemp("scored") / "runs.csv", series, noise=0.003)
    return analyse(read_points(path), resamples=100)


def test_a_curve_is_found_again():
    loss = np.linspace(2.0, 5.0, 9)
    (found,) = fit_curves(loss, CURVE(loss), np.ones((1, 9)))
    assert found.rate == pytest.approx(0.9, rel=0.01)
    assert found(loss) == pytest.approx(CURVE(loss), abs=1e-3)


def test_weights_choose_the_runs_of_a_fit():
    """A weight of 0 leaves a run out; a weight of 2 counts it twice."""
    loss = np.linspace(2.0, 4.0, 8)
    score = CURVE(loss) + np.array([0.3, 0.01, -0.02, 0.0, 0.01, 0.02, -0.01, 0.0])
    weights = np.array([[0, 1, 1, 2, 1, 1, 1, 1]])
    (weighed,) = fit_curves(loss, score, weights)
    (plain,) = fit_curves(*(np.append(column[1:], column[3]) for column in (loss, score)), np.ones((1, 8)))
    assert (weighed.floor, weighed.gain, weighed.rate) == pytest.approx((plain.floor, plain.gain, plain.rate), rel=1e-6)


def test_scores_that_rise_with_the_loss_have_a_flat_curve():
    loss = np.linspace(2.0, 4.0, 8)
    (found,) = fit_curves(loss, loss / 10, np.ones((1, 8)))
    assert found.gain == 0 and found.floor == pytest.approx(0.3)


def test_what_is_found_in_a_table(analysis: Analysis):
    scores = analysis.scores
    assert len(scores.loss) == 22, "two cells are empty"
    assert scores.correlation_interval.low <= scores.correlation <= scores.correlation_interval.high < -0.5
    (hope, of_hope), (transformer, _) = scores.apart["hope"], scores.apart["transformer"]
    assert hope - transformer == pytest.approx(SHIFT, abs=0.01)
    assert of_hope.low < hope < of_hope.high and of_hope.low > 0
    score, interval = scores.of_run(2.5, [2.5] * 100)
    assert interval.low < score < interval.high
    assert score == pytest.approx(CURVE(2.5) + SHIFT / 2, abs=0.02)


def test_intervals_hold_the_score_of_another_run():
    """Of 100 tables of 15 runs, 90 or more hold a sixteenth."""
    random, held = np.random.default_rng(8), 0
    for _ in range(100):
        loss = random.uniform(2.2, 4.0, 15)
        score = CURVE(loss) + 0.02 * random.standard_normal(15)
        weights = np.vstack([np.ones(15), random.exponential(size=(100, 15))])
        curve, *samples = fit_curves(loss, score, weights)
        one = ScoreAnalysis(loss, score, np.full(15, "all"), curve, samples, -1.0, None, {})
        _, interval = one.of_run(3.0, [3.0] * 100)
        held += interval.low <= CURVE(3.0) + 0.02 * random.standard_normal() <= interval.high
    assert held >= 90


def test_what_is_said_of_scores(analysis: Analysis, tmp_path: Path):
    text = "\n".join(describe(analysis))
    assert "scores: 22 runs; rank correlation with the loss -0." in text
    assert "hope at 1.00e+22 FLOPs: loss " in text and "score of one run 0." in text
    assert "from the curve of all, at equal loss" in text
    content = to_json(analysis)["scores"]
    assert content["num_runs"] == 22 and len(content["optimal"]["hope"]) == 3
    page = write_report(analysis, [], tmp_path).read_text()
    assert "<h2>Scores</h2>" in page and (tmp_path / "scores.png").exists()


def test_few_scores_are_said_to_be_few(tmp_path: Path, isoflop_runs):
    points = isoflop_runs(budgets=3, sizes=4)
    table = read_points(write_table(tmp_path / "runs.csv", {"all": points}))
    for _, row in table.rows[4:]:
        row[-1] = ""
    found = analyse(table, resamples=0)
    assert found.scores == "3 runs of 3 losses have a score; a curve needs 6 of 4"
    assert describe(found)[-1] == f"scores: {found.scores}"


def test_a_column_in_per_cent(tmp_path: Path, isoflop_runs):
    """Nobody asked for the scores: the law is fitted all the same. With --score they are an error."""
    path = write_table(tmp_path / "runs.csv", {"all": isoflop_runs(budgets=3, sizes=4)}, percent=True)
    table = read_points(path)
    said = analyse(table, resamples=0).scores
    assert said.startswith(f"{path}, row 3, column score: ") and said.endswith(", but a score is from 0 to 1")
    with pytest.raises(DataError, match="a score is from 0 to 1"):
        analyse(table, resamples=0, score_column="score")
    with pytest.raises(DataError, match="no column 'accuracy', only series, N, D, FLOP, loss, score"):
        analyse(table, resamples=0, score_column="accuracy")
    done = CliRunner().invoke(app, ["sweep", "fit", "--points", str(path), "--resamples", "0", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "but a score is from 0 to 1" in done.output
    assert analyse(table, resamples=0).series["all"].fit is not None


def test_a_table_without_scores_says_nothing(tmp_path: Path, chinchilla: Path):
    assert analyse(read_points(chinchilla, drop_highest=5), resamples=0).scores is None
