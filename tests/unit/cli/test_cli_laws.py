"""`hopescale sweep rollout`, `rates` and `next` on a table, as a person calls them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hopescale.cli.app import app
from hopescale.scaling.law import Law

LAW = Law(E=1.8, A=480.0, alpha=0.35, B=2100.0, beta=0.37)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sizes at three budgets, each with three rates about a best one that falls with the size."""
    rng, rows = np.random.default_rng(0), []
    for budget in (1e19, 1e20, 1e21):
        best = LAW.optimal(budget)[0]
        for size in (0.4, 0.8, 1.6, 3.2):
            params = size * best
            tokens = budget / (6 * params)
            for factor in (0.4, 0.9, 2.0):
                loss = LAW.loss(params, tokens) * np.exp(0.02 * np.log(factor) ** 2 + 0.001 * rng.standard_normal())
                rows.append([params, tokens, loss, factor * 0.02 * (params / 1e8) ** -0.3])
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["N", "D", "loss", "lr"], *rows])
    return path


def sweep(*args: object) -> str:
    done = CliRunner().invoke(app, ["sweep", *map(str, args)], obj={}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_rollout_compares_forms(table: Path):
    out = sweep("rollout", "--points", table, "--asymptote", 1.8)
    assert out.startswith("all:\n  up to ") and "% in their intervals" in out and "\n    held E " in out
    content = json.loads(sweep("rollout", "--points", table, "--json"))["all"]
    assert content["mean_absolute_errors"]["power"] < 0.05 and content["cutoffs"][0]["num_predicted"] > 0


def test_rates_writes_rules_of_a_sweep(table: Path):
    out = sweep("rates", "--points", table)
    assert "optim.lr: " in out and " * N ** -0." in out and "batch" not in out
    content = json.loads(sweep("rates", "--points", table, "--transfer", "--json"))["all"]
    assert list(content["lr"]["exponents"]) == ["D"] and content["batch"] is None


def test_next_proposes_sizes_horizons_and_rates(table: Path):
    out = sweep("next", "--points", table, "--budget", "1e21", "--question", "loss", "--flops", "1e22")
    first, run, *_, last = out.splitlines()
    assert first.startswith("the least loss for 1e+22 FLOPs: ") and last.startswith("  with these, for ")
    assert "  all: N " in run and ", lr 0.0" in run and "% of the interval is left" in run
    content = json.loads(sweep("next", "--points", table, "--budget", "1e21", "--json"))
    assert content["question"] == "size" and content["spent"] <= 1e21 and content["runs"][0]["left"] < 1


def test_fit_weighs_undertuned_runs_and_holds_an_asymptote(table: Path, tmp_path: Path):
    done = sweep("fit", "--points", table, "--weigh-undertuned", "--asymptote", 1.8, "--resamples", 0)
    assert "    E      1.8      (held)" in done


def test_the_laws_of_the_shipped_sweep_are_those_of_its_page(tmp_path: Path):
    runs = Path(__file__).parents[3] / "docs" / "scaling" / "hope_laws"
    found = json.loads(sweep("fit", "--points", runs / "points.csv", "--out", tmp_path, "--json"))
    shown = (runs.parents[1] / "scaling.md").read_text()
    for row, column in ((3, "hope"), (2, "hope_linear")):
        each = found["multipliers"][column][row]
        value, low, high = each["value"], each["interval"]["low"], each["interval"]["high"]
        assert high / low < 2 and f"{value:.2f} ({low:.2f} to {high:.2f})" in shown
    assert found["multipliers"]["hope"][4]["interval"]["high"] < 1, "the Transformer is ahead of MLP memories"
    rates = sweep("rates", "--points", runs / "rates.csv", "--json")
    assert {name: round(one["lr"]["exponents"]["N"], 2) for name, one in json.loads(rates).items()} == {
        "hope": -0.99,
        "hope_linear": -0.27,
        "transformer": -0.63,
    }
