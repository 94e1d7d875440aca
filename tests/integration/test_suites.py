"""Runs trained on a suite, asked it, and put side by side, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SOURCES = ("data.sources.markov=null", "data.sources.pairs={suite: {task: mqar, num_symbols: 16, num_pairs: 3}}")
SHORT = ("train.steps=2", "train.validation.every=null")


@pytest.fixture(scope="module")
def runs(hopescale, tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in their seed."""
    folders = [tmp_path_factory.mktemp("suites") / str(seed) for seed in (0, 1)]
    settings = tuple(setting for setting in tiny if not setting.startswith("data.sources"))
    for seed, folder in enumerate(folders):
        done = hopescale("train", "debug", *settings, *SOURCES, *SHORT, f"train.seed={seed}", "--run-dir", folder)
        assert done.code == 0, done.err
    return folders


def test_models_are_asked_and_put_side_by_side(hopescale, runs: list[Path], tmp_path: Path):
    asked = ("--suite", "trained,position", "--limit", 3, "--pairs", "2,3", "--length", "16,32")
    done = hopescale("eval", *runs, *asked, "--report", tmp_path / "first")
    assert done.code == 0, done.err
    assert done.out.count("mqar") == 8 and "chance  best" in done.out
    found = json.loads((tmp_path / "first" / "report.json").read_text())
    assert [len(system["models"]) for system in found["systems"]] == [2]
    points = {(dict(one["settings"])["length"], dict(one["settings"])["num_pairs"]): one for one in found["suites"]}
    assert points.keys() == {(16, 2), (16, 3), (32, 2), (32, 3)}
    assert all(one["chance"] == pytest.approx(1 / pairs) for (_, pairs), one in points.items())
    (values,) = points[16, 3]["values"].values()
    assert values["accuracy"]["seeds"] == 2
    assert [(one["suite"], dict(one["settings"])["length"]) for one in found["positions"]] == [("pairs", 32)]
    again = hopescale("report", *runs, "--out", tmp_path / "second")
    assert again.code == 0, again.err
    for name in ("report.json", "report.md", "accuracy_by_length.png", "accuracy_by_num_pairs.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_cannot_be_asked_is_said_and_nothing_is_written(hopescale, runs: list[Path], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("evals"))
    refused = {
        ("--suite", "mqar", "--length", "9"): "needs 12 tokens, an example has 9",
        ("--suite", "memorise"): "257 symbols, but model.vocab_size is 32",
        ("--suite", "parity", "--pairs", "4"): "parity have no num_pairs",
    }
    for options, said in refused.items():
        done = hopescale("eval", run, *options)
        assert done.code == 2 and said in done.err
    done = hopescale("eval", run, run, "--suite", "mqar", "--out", tmp_path / "x.json")
    assert done.code == 2 and "one file, but there are 2 models" in done.err
    done = hopescale("report", run, "--out", tmp_path / "report")
    assert done.code == 3 and "no evaluations" in done.err
    assert not (run / "evals").exists() and not (tmp_path / "report").exists()
