"""Multipliers by runs, and what is said where a law is none to rely on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hopescale.cli.app import app
from hopescale.scaling.analysis import analyse
from hopescale.scaling.best_runs import multipliers_of_runs
from hopescale.scaling.law import Law
from hopescale.scaling.plot import draw
from hopescale.scaling.points import Points, Table, read_points
from hopescale.scaling.report import write_report
from hopescale.scaling.summary import describe, to_json


def points(flops: list[float], loss: list[float]) -> Points:
    ones = np.ones(len(flops))
    return Points(ones, ones, np.array(flops), np.array(loss))


def test_the_multiplier_by_runs_is_that_of_the_reference_s_interpolated_runs():
    reference = points([1e10, 1e12, 1.1e12], [5.0, 3.0, 3.5])
    series = points([1e9, 1e11, 1.1e11, 1e13, 1e14], [5.5, 4.5, 4.0, 3.0, 2.5])
    found = multipliers_of_runs(series, reference)
    assert [one.flops for one in found] == [1e9, 1.1e11, 1e13, 1e14]
    assert [one.value for one in found] == [None, pytest.approx(1e11 / 1.1e11), pytest.approx(0.1), None]
    assert [one.reached for one in found] == [True, True, True, False]


def test_a_best_size_outside_the_sizes_that_were_run_is_not_determined(isoflop_runs, tmp_path: Path):
    law = Law(E=1.8, A=480.0, alpha=0.35, B=2085.0, beta=0.37)
    runs = isoflop_runs(law, budgets=3, sizes=6)
    best = np.array([law.optimal(flops)[0] for flops in runs.flops])
    small = runs.take((runs.params < 0.8 * best) & (runs.params < 0.8 * best.max() / 4))
    analysis = analyse(Table({"small": small, "transformer": runs}, [], Path("t.csv")), resamples=0)
    assert analysis.series["transformer"].doubt is None
    assert "outside the sizes that were run" in analysis.series["small"].doubt
    assert analysis.multipliers == {} and list(analysis.of_runs) == ["small"]
    text = "\n".join(describe(analysis))
    assert "best size for a budget: not determined: by the law it is" in text
    assert "by the laws: not determined" in text and text.count("compute-optimal by law") == 1
    content = to_json(analysis)
    assert content["series"]["small"]["optimal"] == [] and len(content["series"]["transformer"]["optimal"]) == 3
    page = write_report(analysis, [], tmp_path).read_text()
    assert "by the best runs alone" in page and "by the laws</caption>" not in page
    _, figure = draw(analyse(Table({"small": small}, [], Path("t.csv")), resamples=0))["isoflop"]
    assert [text.get_text() for text in figure.axes[-1].texts] == ["not determined by these runs"]


def test_too_few_runs_are_drawn_without_a_law(tmp_path: Path):
    rows = [
        {"name": f"t{i}", "N": 1000 * (1 + i % 2), "D": 1e5 * (1 + i // 2), "val_loss": 5 - 0.1 * i} for i in range(4)
    ]
    (tmp_path / "runs.json").write_text(json.dumps([*rows, {"name": "bad", "N": 5, "D": 5, "val_loss": None}]))
    assert len(read_points(tmp_path / "runs.json").series["all"]) == 4
    args = ["--points", str(tmp_path / "runs.json"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["sweep", "plot", *args], obj={})
    assert done.exit_code == 0, done.exception
    assert "note: series all has no law: 4 runs of 2 sizes" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "t3</td>" in page and "val_loss" in page and "too few for a law" in page
    assert not (tmp_path / "out" / "surface.png").exists()
