"""The benchmark tools, as a developer runs them, at the smallest size."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hopescale.config.load import load_recipe
from hopescale.engine import Engine
from hopescale.observe.health import StepLimits
from hopescale.ops.cpp import build

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = ("--d-model", "16", "--heads", "2", "--layers", "1", "--threads", "1")


def run_tool(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)


def rows_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


NAMES = (
    "transformer",
    "deltanet",
    "gated_deltanet",
    "hope",
    "hope_attention",
    "mamba2",
    "retnet",
    "samba",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "hope:memory=linear",
    "hope:memory=linear:chunk_size=8",
)


def test_every_mixer_is_compared_with_the_transformer(tmp_path: Path):
    out, image = tmp_path / "rows.jsonl", tmp_path / "mixers.png"
    options = ("--mixers", ",".join(NAMES[1:]), "--seq-lens", "70", "--rounds", "1", "--out", out, "--plot", image)
    done = run_tool("bench_mixers.py", *SMALL, *options, "--documents", "30")
    assert done.returncode == 0, done.stderr
    rows = rows_in(out)
    assert tuple(row["mixer"] for row in rows) == NAMES
    assert rows[0]["tps_ratio"] == rows[0]["memory_ratio"] == 1
    for row in rows:
        assert (row["seq_len"], row["threads"], row["batch"], row["documents"]) == (70, 1, 2, 30)
        assert row["tps_ratio"] == pytest.approx(row["tps"] / rows[0]["tps"])
        assert row["memory_ratio"] == pytest.approx(row["extra_mib"] / rows[0]["extra_mib"])
    memory = {row["mixer"]: row["extra_mib"] for row in rows}
    assert memory["hope"] > memory["titans"] > memory["transformer"] > 0
    assert memory["hope:memory=linear:chunk_size=8"] != memory["hope:memory=linear"]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and "tps_ratio" in table[0]
    assert image.stat().st_size > 0


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        ("hop", "there is no mixer 'hop'"),
        ("titans:chunk=8", "mixers.titans.chunk: unknown key"),
        ("samba:window=8", "samba_tiny has mamba2, local"),
    ],
)
def test_a_mixer_that_does_not_exist_is_one_message(mixer: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", ["bench_mixers.py", "--mixers", mixer])
    with pytest.raises(SystemExit, match=said):
        runpy.run_path(str(TOOLS / "bench_mixers.py"), run_name="__main__")


def test_training_steps_are_split_into_parts(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    sizes = ("model.d_model=16", "train.seq_len=32", "train.global_batch_tokens=256", "train.micro_batch_size=auto")
    done = run_tool("bench_train.py", "debug", *sizes, "--against", "debug", "--steps", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    first, second = rows_in(out)
    assert first["recipe"] == second["recipe"] == "debug" and first["tps_ratio"] == first["memory_ratio"] == 1
    for row in (first, second):
        assert row["tokens"] == 256 and row["peak_gib"] > 0
        assert row["tps"] == pytest.approx(256 / (row["data_s"] + row["gradients_s"] + row["update_s"]))

    done = run_tool("bench_train.py", "debug")
    assert done.returncode == 1 and "name one with --against" in done.stderr


def test_updates_are_timed_through_the_gate_that_training_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    given, update = [], Engine.update

    def noted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        given.append(options["limits"])
        return update(engine, *arguments, **options)

    monkeypatch.setattr(Engine, "update", noted)
    sizes = ("model.d_model=16", "train.seq_len=32", "train.global_batch_tokens=256", "train.steps=2")
    taken = list(runpy.run_path(str(TOOLS / "bench_train.py"))["train"](load_recipe("debug", sizes).config))
    assert len(taken) == len(given) == 2 and all(isinstance(limits, StepLimits) for limits in given)


def test_prompts_and_tokens_are_timed_for_each_context(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    few = ("--prompt", "20", "--contexts", "3,70", "--rounds", "1", "--tokens", "1", "--out", out)
    done = run_tool("bench_generate.py", "debug", *few)
    assert done.returncode == 0, done.stderr
    (row,) = rows_in(out)
    assert (row["recipe"], row["prompt"], row["prompt_ratio"]) == ("debug", 20, 1)
    assert min(row[name] for name in ("prompt_tps", "ms_3", "ms_70", "prompt_mib")) > 0
    assert row["state_mib_3"] == row["state_mib_70"] > 0


def test_a_profile_names_the_operations():
    done = run_tool("profile_mixer.py", "deltanet", *SMALL, "--seq-len", "70", "--top", "200")
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert any("aten::linalg_solve_triangular" in line for line in table)
    assert "under the profiler" in done.stdout


@pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")
def test_resets_are_compared_with_none():
    mixers = ("hope", "hope:reset_every=64:far.chunk_size=64")
    sizes = ("--d-model", "32", "--heads", "2", "--seq-len", "130", "--rounds", "1")
    done = run_tool("bench_resets.py", *sizes, "--mixers", ",".join(mixers))
    assert done.returncode == 0, done.stderr
    table = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "mixer" and tuple(table[2:]) == mixers


def test_update_rules_are_drawn_on_the_toy_function(tmp_path: Path):
    image = tmp_path / "eq53.png"
    done = run_tool("plot_eq53.py", "--steps", "3", "--last-rate", "0", "--out", image)
    assert done.returncode == 0, done.stderr
    rules = ("Momentum", "Delta Momentum", "AdamW", "Muon", "M3")
    assert tuple(line.partition("  ")[0] for line in done.stdout.splitlines()) == rules
    assert image.stat().st_size > 0


def test_orthogonalizers_are_compared():
    done = run_tool("compare_orthogonalizers.py", "--rows", "8", "--ratio", "2")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 10 and all(float(row[-4]) < 1 for row in rows)
