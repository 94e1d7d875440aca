"""The same run on every layout: losses and all weights equal one process, and a resume in mid-period equals itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hopescale.train import state
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks

ROLLING = "model.cms.levels.slow.rolling=true"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 sequence parallel": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pp=2",)),
    "pp2 interleaved": (2, ("parallel.pp=2", "parallel.virtual_stages=2")),
    "pp2 untied, block recomputed": (2, ("parallel.pp=2", "model.tie_embeddings=false", "train.recompute=block")),
    "dp2": (2, ("parallel.dp=2",)),
    "dp2 zero 1": (2, ("parallel.zero=1",)),
    "dp2 zero 2, rolling": (2, ("parallel.zero=2", ROLLING)),
    "dp2 zero 3, rolling": (2, ("parallel.zero=3", ROLLING)),
    "tp2 x pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
    "tp2 x pp2 interleaved, sequence parallel, memory recomputed": (
        4,
        (
            "parallel.tp=2",
            "parallel.pp=2",
            "parallel.virtual_stages=2",
            "parallel.sequence_parallel=true",
            "train.recompute=memory",
        ),
    ),
    "tp2 x pp2, wider than its base": (
        4,
        ("parallel.tp=2", "parallel.pp=2", "model.transfer={base_width: 16, base_head_dim: 4}"),
    ),
    "tp2 x dp2": (4, ("parallel.tp=2",)),
    "tp2 x dp2 zero 3": (4, ("parallel.tp=2", "parallel.zero=3")),
    "pp2 x dp2": (4, ("parallel.pp=2",)),
    "pp2 x dp2 zero 1": (4, ("parallel.pp=2", "parallel.zero=1")),
}
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a run of one process, trained at the first call for its settings."""

    @cache
    def run(*settings: str) -> Path:
        folder = tmp_path_factory.mktemp("single") / "run"
        train_run(folder, 1, *settings)
        return folder

    return run


def train_twice(rank: int, num_ranks: int, folder: Path, settings: tuple[str, ...]) -> None:
    """Train, then train again from the checkpoint in the middle."""
    train_run(folder / "whole", num_ranks, *settings)
    if rank == 0:
        fork(folder / "whole", folder / "parts", step=3)
    dist.barrier()
    train_run(folder / "parts", num_ranks, *settings)


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_model(single: Callable[..., Path], name: str, precision: str, tmp_path: Path):
    num_ranks, layout = LAYOUTS[name]
    settings, bound = (*layout, f"train.precision={precision}"), BOUNDS[precision]
    run_ranks(train_twice, num_ranks, tmp_path, num_ranks, tmp_path, settings)
    expected = single(*(setting for setting in settings if not setting.startswith(("parallel.", "train.recompute"))))
    run, parts = tmp_path / "whole", tmp_path / "parts"
    for metric in ("loss", "val/markov/loss", *(["grad_norm"] if precision == "fp32" else [])):
        assert values(run, metric) == pytest.approx(values(expected, metric), rel=bound), metric
    error, parameter = worst(weights(run), weights(expected))
    assert error <= bound, f"{parameter} is off by {error:.1e}"
    assert values(run) == values(parts), "resumed in mid-period"
    ended = saved(parts)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(run).items())


def train_twice_adding_up(rank: int, num_ranks: int, folder: Path, settings: tuple[str, ...]) -> None:
    state.MAX_SUMS = 1
    train_twice(rank, num_ranks, folder, settings)


def test_sums_of_many_replicas_are_added_up_when_they_are_saved(single: Callable[..., Path], tmp_path: Path):
    run_ranks(train_twice_adding_up, 2, tmp_path, 2, tmp_path, ("train.precision=fp32",))
    assert not any(name.endswith(".accumulator.1") for name in saved(tmp_path / "whole", 3))
    assert values(tmp_path / "whole") == values(tmp_path / "parts")
    assert worst(weights(tmp_path / "parts"), weights(single("train.precision=fp32")))[0] <= 1e-5


TARGETS = {
    "one process": (1, 1, 1),
    "tp2 x dp2": (1, 2, 2),
    "pp4": (4, 1, 1),
    "dp4": (1, 1, 4),
}
"""`(pp, tp, dp)`."""


def degrees(pp: int, tp: int, dp: int) -> tuple[str, ...]:
    return (f"parallel.pp={pp}", f"parallel.tp={tp}", f"parallel.dp={dp}")


def train_from(rank: int, source: Path, folder: Path, settings: dict[str, tuple[str, ...]]) -> None:
    for name, layout in settings.items():
        if rank == 0:
            fork(source, folder / name, step=3)
        dist.barrier()
        train_run(folder / name, 4, *layout)


def train_source(rank: int, folder: Path, settings: tuple[str, ...]) -> None:
    train_run(folder, 4, *settings)


@pytest.mark.parametrize("zero", [0, 1])
def test_a_checkpoint_of_one_layout_continues_on_any_other(zero: int, tmp_path: Path):
    """Saved in mid-period at pp2 x tp2, or with sharded states at pp2 x dp2."""
    source = tmp_path / "source"
    saved_at = degrees(2, 1, 2) if zero else degrees(2, 2, 1)
    run_ranks(train_source, 4, tmp_path, source, (*saved_at, f"parallel.zero={zero}"))
    expected = values(source)
    several = {name: degrees(*axes) for name, axes in TARGETS.items() if name != "one process"}
    if zero:
        several = {"dp4 zero 3": (*degrees(1, 1, 4), "parallel.zero=3")}
    run_ranks(train_from, 4, tmp_path, source, tmp_path, several)
    fork(source, tmp_path / "one process", step=3)
    train_run(tmp_path / "one process", 1)
    for name in (*several, "one process"):
        assert values(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
        error, parameter = worst(weights(tmp_path / name), weights(source))
        assert error <= 1e-5, f"{name}: {parameter} is off by {error:.1e}"
