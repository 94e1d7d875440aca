"""What a person sees of an analysis: lines, JSON, figures, the report, and the two verbs that make them."""

from __future__ import annotations

import csv
import json
import re
import struct
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hopescale.cli.app import app
from hopescale.common.errors import ConfigError, DataError
from hopescale.observe.metrics import MetricsLog
from hopescale.scaling.analysis import Analysis, analyse
from hopescale.scaling.curves import read_curves
from hopescale.scaling.law import Law, read_law
from hopescale.scaling.plot import draw
from hopescale.scaling.points import Points, Table, read_points
from hopescale.scaling.report import write_report
from hopescale.scaling.summary import describe, to_json
from tests.unit.scaling.conftest import REPLICATION

BETTER = Law(E=1.8172, A=400.0, alpha=0.3478, B=1700.0, beta=0.3658)
FIGURES = {"curves", "frontier", "isoflop", "residuals", "surface"}


def sweep_folder(folder: Path, series: dict[str, Points]) -> Path:
    """Write a sweep's table and the records of its trials as `sweep collect` and `train` leave them."""
    rows = []
    for name, points in series.items():
        for number in range(len(points)):
            trial = f"{name}-{number}"
            values = points.params[number], points.tokens[number], points.flops[number], points.loss[number]
            rows.append([trial, name, "w8", *map(float, values), "done"])
            path = folder / "trials" / trial / "metrics.jsonl"
            path.parent.mkdir(parents=True)
            log = MetricsLog(path, resume_step=None)
            for step in range(1, 101):
                log.log(step, int(values[1] * step / 100), {"loss": float(values[3]) * (100 / step) ** 0.1})
            log.close()
    rows.append(["hope-x", "hope", "w9", 1e9, 1e9, 6e18, "", "diverged"])
    with (folder / "points.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["trial", "series", "size", "N", "D", "FLOP", "loss", "state"], *rows])
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, isoflop_runs) -> Path:
    """A sweep of Hope and Transformer, 4 sizes at 3 budgets each, collected."""
    shape = {"budgets": 3, "sizes": 4, "noise": 0.003}
    runs = {"hope": isoflop_runs(BETTER, seed=1, **shape), "transformer": isoflop_runs(seed=2, **shape)}
    return sweep_folder(tmp_path_factory.mktemp("sweep"), runs)


@pytest.fixture(scope="module")
def analysis(sweep: Path) -> Analysis:
    return analyse(read_points(sweep / "points.csv"), resamples=20)


def test_the_reference_and_the_multipliers(analysis):
    assert analysis.reference == "transformer" and list(analysis.multipliers) == ["hope"]
    values = analysis.multipliers["hope"]
    assert [value.flops for value in values] == pytest.approx(np.geomspace(1e19, 1e22, 5))
    for value in values:
        wanted = REPLICATION.flops_for(BETTER.loss(*BETTER.optimal(value.flops))) / value.flops
        assert value.value == pytest.approx(wanted, rel=0.25)
        assert value.interval.low < value.value < value.interval.high
    turned = analyse(analysis.table, "hope", resamples=0)
    assert list(turned.multipliers) == ["transformer"] and turned.multipliers["transformer"][2].value < 1
    with pytest.raises(DataError, match="no series titans, only hope, transformer"):
        analyse(analysis.table, "titans")


def test_lines_say_what_was_found_and_what_was_left_out(analysis):
    text = "\n".join(describe(analysis))
    assert "24 runs, 1 left out" in text and "row 26: diverged" in text
    assert "hope: 12 runs" in text and "transformer: 12 runs" in text
    assert "by isoFLOP minima of 3 of 3 budgets, N ~ C^0.5" in text
    assert "fitted without the 4 runs of 1.0e+22 FLOPs and more" in text
    assert "hope: the compute that transformer needs for the same loss" in text


def test_a_best_size_that_was_not_run_is_said(isoflop_runs):
    points = isoflop_runs(budgets=3)
    best = np.array([REPLICATION.optimal(flops)[0] for flops in points.flops])
    for chosen, said in ((points.params > 1.3 * best, "smallest"), (points.params < best / 1.3, "largest")):
        lines = describe(analyse(Table({"all": points.take(chosen)}, [], Path("t.csv")), resamples=0))
        assert any(f"at 3 of 3 budgets the {said} model is the best" in line for line in lines)
    assert not any(
        "is the best" in line for line in describe(analyse(Table({"all": points}, [], Path("t.csv")), None, 0))
    )


def test_every_one_of_many_series_is_drawn(isoflop_runs):
    names = [f"series{number}" for number in range(8)] + ["transformer"]
    points = isoflop_runs(budgets=2, sizes=2)
    numbered = {name: replace(points, loss=points.loss * (1 + 0.01 * place)) for place, name in enumerate(names)}
    figures = draw(analyse(Table(numbered, [], Path("t.csv")), resamples=0, need_laws=False))
    legend = figures["frontier"][1].axes[0].get_legend()
    assert sum("series" in text.get_text() for text in legend.get_texts()) == 8


def test_json_is_a_file_of_laws(analysis, tmp_path):
    content = json.loads(json.dumps(to_json(analysis), allow_nan=False))
    (tmp_path / "law.json").write_text(json.dumps(content))
    assert read_law(tmp_path / "law.json", "hope") == analysis.series["hope"].fit.law
    hope = content["series"]["hope"]
    assert hope["num_runs"] == 12 and hope["flops"]["scale"] == pytest.approx(6)
    assert hope["intervals"]["alpha"]["low"] < hope["alpha"] < hope["intervals"]["alpha"]["high"]
    assert [minimum["num_runs"] for minimum in hope["isoflop"]["minima"]] == [4, 4, 4]
    assert content["multipliers"]["hope"][0]["interval"]["low"] > 0


def test_json_has_no_infinities(isoflop_runs):
    low = isoflop_runs(Law(1.2, *list(REPLICATION.to_dict().values())[1:]), budgets=3, sizes=4)
    table = Table({"a": isoflop_runs(budgets=3, sizes=4), "b": low}, [], Path("t.csv"))
    analysis = analyse(table, resamples=5)
    content = json.dumps(to_json(analysis), allow_nan=False)
    assert json.loads(content)["multipliers"]["b"][-1]["value"] is None
    assert "never reached" in "\n".join(describe(analysis))


def test_a_small_series_is_named(isoflop_runs):
    table = Table({"good": isoflop_runs(), "bad": isoflop_runs(budgets=1, sizes=4)}, [], Path("t.csv"))
    with pytest.raises(DataError, match="series bad: 4 runs of 4 sizes"):
        analyse(table)


def test_curves_follow_the_records(sweep, analysis):
    curves = read_curves(sweep / "points.csv")
    assert len(curves) == 24 and {curve.series for curve in curves} == {"hope", "transformer"}
    points = analysis.series["hope"].points
    curve = curves[0]
    assert curve.params == points.params[0]
    assert curve.flops[-1] == pytest.approx(points.flops[0], rel=0.05) and curve.flops[-1] <= points.flops[0]
    assert curve.loss[-1] == pytest.approx(points.loss[0], rel=0.01)
    assert (np.diff(curve.flops) > 0).all() and (np.diff(curve.loss) < 0).all()
    assert len(curve.flops) <= 60


def test_the_curve_of_a_branch_begins_with_its_trunk(tmp_path: Path):
    for name, steps, loss in (("long", range(1, 9), 4.0), ("short", range(4, 6), 2.0)):
        (tmp_path / "trials" / name).mkdir(parents=True)
        log = MetricsLog(tmp_path / "trials" / name / "metrics.jsonl", resume_step=None)
        for step in steps:
            log.log(step, 10 * step, {"loss": loss})
        log.close()
    header = ["trial", "N", "D", "FLOP", "loss", "trunk", "branch_step"]
    rows = [["long", 1, 80, 480, 4, "", ""], ["short", 1, 50, 300, 2, "long", 3]]
    with (tmp_path / "points.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    whole, branch = read_curves(tmp_path / "points.csv")
    assert whole.loss.tolist() == [4.0] * len(whole.loss)
    assert branch.flops[0] == 60 and branch.flops[-1] > 240
    assert [loss for flops, loss in zip(branch.flops, branch.loss, strict=True) if flops < 190] == [4.0] * 3


def test_a_table_alone_has_no_curves(chinchilla):
    assert read_curves(chinchilla) == []


class Links(HTMLParser):
    """Collects what a page asks a browser to load, and the text of its cells."""

    def __init__(self):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_report_needs_no_other_file(sweep, analysis, tmp_path):
    page = write_report(analysis, read_curves(sweep / "points.csv"), tmp_path / "report")
    assert {path.stem for path in page.parent.glob("*.png")} == FIGURES
    for path in page.parent.glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 700 and height > 400
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert len(links.loads) == len(FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in links.loads)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "row 26: diverged" in text and "Against transformer" in text


def test_names_are_escaped(isoflop_runs, tmp_path):
    runs = isoflop_runs(budgets=3, sizes=4)
    analysis = analyse(Table({"<b>&": runs, "plain": runs}, [], Path("t.csv")), resamples=0)
    text = write_report(analysis, [], tmp_path).read_text()
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text
    assert not (tmp_path / "curves.png").exists()


def invoke(*args: str | Path):
    return CliRunner().invoke(app, ["sweep", *map(str, args)], obj={}, catch_exceptions=True)


def test_fit_prints_and_writes_the_law(sweep, chinchilla, tmp_path):
    done = invoke("fit", sweep, "--resamples", 10)
    assert done.exit_code == 0 and f"law: {sweep / 'law.json'}" in done.stdout
    assert read_law(sweep / "law.json", "transformer").alpha == pytest.approx(REPLICATION.alpha, abs=0.1)
    done = invoke("fit", "--points", chinchilla, "--drop-highest", 5, "--json", "--out", tmp_path, "--resamples", 5)
    content = json.loads(done.stdout)
    assert content == json.loads((tmp_path / "law.json").read_text())
    assert content["series"]["all"]["num_runs"] == 240


def test_plot_takes_a_sweeps_file(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("name: mine\nrecipe: debug\n")
    Path("sweeps").mkdir()
    Path("sweeps/mine").symlink_to(sweep)
    done = invoke("plot", "mine.yaml", "--resamples", 0)
    assert done.exit_code == 0 and done.stdout == "report: sweeps/mine/report/report.html\n"
    assert (sweep / "report" / "curves.png").is_file()


def test_mistakes_are_one_message(sweep, chinchilla, tmp_path, monkeypatch):
    def error(*args: str | Path) -> Exception:
        return invoke(*args).exception

    for failed in (error("fit"), error("fit", sweep, "--points", chinchilla)):
        assert isinstance(failed, ConfigError) and "one of both" in failed.message
    (tmp_path / "empty").mkdir()
    failed = error("fit", tmp_path / "empty")
    assert isinstance(failed, DataError) and "sweep collect" in failed.hint
    failed = error("fit", chinchilla)
    assert isinstance(failed, ConfigError) and "--points" in failed.hint
    failed = error("plot", "--points", chinchilla)
    assert isinstance(failed, ConfigError) and "--out" in failed.hint
    (tmp_path / "file").write_text("")
    failed = error("fit", "--points", chinchilla, "--out", tmp_path / "file", "--resamples", "0")
    assert isinstance(failed, DataError) and "cannot write" in failed.message
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("hopescale.cli.options.find_spec", lambda name: None)
    failed = error("plot", sweep)
    assert isinstance(failed, ConfigError) and "hopescale[scaling]" in failed.hint
