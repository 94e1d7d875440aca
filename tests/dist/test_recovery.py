"""A bad step is bad on all ranks: skipped or taken back, ranks end where one process does, however much is sharded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hopescale.engine import Engine
from hopescale.engine.schedule import Loop
from tests.support.layouts import train_run, weights, worst
from tests.support.ranks import run_ranks

SKIP: tuple[str, ...] = ()
BACK = ("train.recovery.skips=0", "train.recovery.then=lower_rate")


def poisoned(rank: int, folder: Path, num_ranks: int, overrides: tuple[str, ...]) -> None:
    """A rank's loss of step 5 is not a number while the rate is full; a slow level has gathered since step 4."""
    gradients, loss_of = Engine.gradients, Loop._loss

    def spoiled(engine: Engine, step: int, *arguments, **options):
        bad = step == 5 and rank == num_ranks - 1 and engine.optimizer.rate_factor == 1
        Loop._loss = (lambda *inner: loss_of(*inner) * math.nan) if bad else loss_of
        return gradients(engine, step, *arguments, **options)

    Engine.gradients = spoiled
    try:
        train_run(folder, num_ranks, *overrides, planned=False)
    finally:
        Engine.gradients, Loop._loss = gradients, loss_of


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """Give the run of one process, by what follows the bad step."""
    runs: dict[tuple[str, ...], Path] = {}

    def of(recovery: tuple[str, ...]) -> Path:
        if recovery not in runs:
            runs[recovery] = tmp_path_factory.mktemp("alone") / "run"
            poisoned(0, runs[recovery], 1, recovery)
        return runs[recovery]

    return of


@pytest.mark.parametrize("recovery", [SKIP, BACK], ids=["skipped", "taken back"])
@pytest.mark.parametrize("layout", ["parallel.zero=0", "parallel.zero=1", "parallel.zero=2", "parallel.zero=3"])
def test_ranks_end_where_one_process_does(recovery: tuple[str, ...], layout: str, alone, tmp_path: Path):
    run_ranks(poisoned, 2, tmp_path, tmp_path / "run", 2, (*recovery, layout))
    error, parameter = worst(weights(tmp_path / "run"), weights(alone(recovery)))
    assert error <= 1e-5, f"{parameter} is off by {error:.1e}"


@pytest.mark.parametrize("rule", ["muon", "dgd"])
def test_matrices_with_owners_skip_too(rule: str, tmp_path: Path):
    """Gradients and Gram matrices that were sent to their owners are dropped there."""
    small = {  # rounding stays small; AdamW divides it by no gradient that is nearly 0
        "muon": ("optim.muon.ns_steps=3", "optim.muon.ns_dtype=fp32", "optim.eps=1e-4"),
        "dgd": ("optim.groups.matrices.lr_scale=20",),
    }
    match = "['*.gate.weight','*.up.weight','*.down.weight']"
    settings = (f"optim.groups.matrices={{rule: {rule}, match: {match}}}", *small[rule])
    poisoned(0, tmp_path / "one", 1, settings)
    run_ranks(poisoned, 2, tmp_path, tmp_path / "two", 2, settings)
    error, parameter = worst(weights(tmp_path / "two"), weights(tmp_path / "one"))
    assert error <= 1e-5, f"{parameter} is off by {error:.1e}"
