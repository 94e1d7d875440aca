"""A bad step is bad on all ranks: skipped or taken back, ranks end where one process does, however much is sharded."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from hopescale.engine import Engine
from hopescale.engine.segments import Segments
from hopescale.train.trainer import Trainer
from tests.support.layouts import saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks

SKIP: tuple[str, ...] = ()
BACK = ("train.recovery.skips=0", "train.recovery.then=lower_rate")


LATE = (
    *("model.num_layers=1", "log.every=100", "checkpoint.every=3"),
    *("train.validation.every=null", "train.replica_check_every=null"),
)
"""Steps 1, 3 and 6 are known at once, the others when the passes of the next one have been launched."""
MATRICES = "optim.groups.matrices={rule: m3, match: ['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']}"


def poisoned(rank: int, folder: Path, num_ranks: int, overrides: tuple[str, ...]) -> None:
    """The last rank's loss of step 5 is not a number while the rate is full; a slow level has gathered since step 4."""
    gradients, run = Engine.gradients, Segments.run

    def spoiled(engine: Engine, step: int, *arguments, **options):
        bad = step == 5 and rank == num_ranks - 1 and engine.optimizer.rate_factor == 1
        Segments.run = (lambda *inner: run(*inner) * math.nan) if bad else run
        return gradients(engine, step, *arguments, **options)

    Engine.gradients = spoiled
    try:
        train_run(folder, num_ranks, *overrides, planned=False)
    finally:
        Engine.gradients, Segments.run = gradients, run


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


DGD = "optim.groups.matrices={rule: dgd, match: ['*.gate.weight','*.up.weight','*.down.weight'], lr_scale: 20}"
WIRES = ("model.cms.levels.slow={phase: 3, wire: int8}", "model.cms.levels.mid.wire=bf16")
"""The slow level is due at the bad step, and its sum leaves with a rest behind."""
TWO = {
    "zero 0, taken back": ("parallel.zero=0", *BACK, *WIRES),
    "zero 1, skipped": ("parallel.zero=1", "train.precision=bf16"),
    "zero 1, matrices, wires": ("parallel.zero=1", MATRICES, *WIRES),
    "matrices, taken back": ("parallel.zero=1", MATRICES, *BACK),
    "dgd, taken back": (DGD, *BACK),
    "tp": ("parallel.tp=2",),
    "pp": ("parallel.pp=2", "model.num_layers=2"),
    "cp": ("parallel.cp=2", "parallel.zero=1"),
}
"""At tp 2 the loss of the other rank counts, so that the step is bad by its norm alone."""
FOUR = {"nodes, skipped": ("parallel.shard=node", "parallel.ranks_per_node=2")}


def both_ways(rank: int, folder: Path, num_ranks: int, layouts: dict[str, tuple[str, ...]]) -> None:
    """Train with a device that drops what is bad before the host knows, and with a host that waits for each step."""
    must_know, late = Trainer._must_know, []

    def noting(trainer: Trainer, *arguments) -> bool:
        if not (is_known := must_know(trainer, *arguments)):
            late.append(trainer.state.step)
        return is_known

    for name, settings in layouts.items():
        late.clear()
        with patch.object(Trainer, "_must_know", noting):
            poisoned(rank, folder / name / "late", num_ranks, (*LATE, *settings))
        # The first step of a start is known at once, and so is the first one behind a return.
        assert late == [2, 4, 5, *([5] if set(BACK) <= set(settings) else [])], (name, late)
        with patch.object(Engine, "is_gated", property(lambda _: False)):
            poisoned(rank, folder / name / "waits", num_ranks, (*LATE, *settings))


@pytest.mark.parametrize("layouts", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_ranks_that_learn_late_of_a_bad_step_end_where_ranks_that_wait_do(
    layouts: dict[str, tuple[str, ...]], tmp_path: Path
):
    num_ranks = 2 if layouts is TWO else 4
    run_ranks(both_ways, num_ranks, tmp_path, tmp_path, num_ranks, layouts, limit_s=400)
    for layout in layouts:
        runs = tmp_path / layout / "late", tmp_path / layout / "waits"
        late, waits = map(saved, runs)
        assert late.keys() == waits.keys()
        assert [name for name in late if not torch.equal(late[name], waits[name])] == [], layout
        for name in ("loss", "grad_norm", "steps_skipped", "level/mid/update_rms", "level/slow/grad_norm"):
            assert values(runs[0], name) == values(runs[1], name), (layout, name)
        assert 4 in values(runs[0], "level/mid/update_rms"), "a level that is due is recorded, though late"
        assert (5 in values(runs[0], "steps_skipped")) != (set(BACK) <= set(layouts[layout]))
