"""Levels that roll, come late or are rounded on the wire: on two ranks as on one, and when a run goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.checkpoint.manifest import Manifest
from hopescale.common.errors import CheckpointError
from hopescale.config.layout import Layout
from hopescale.cost import updates
from hopescale.engine.zero import ZeroAdamW
from hopescale.optim.replicated import ReplicatedAdamW
from hopescale.parallel.mesh import Mesh
from hopescale.train import state
from tests.support.late_sums import CADENCES, STEPS, Twin, make, take
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks

LATE = (
    "model.num_layers=2",
    "model.d_model=16",
    "model.cms.levels.mid={d_ff: 16, update_every_steps: 3, lag: 2}",
    "model.cms.levels.slow={d_ff: 16, update_every_steps: 4, phase: 1, rolling: true}",
    "train.precision=fp32",
    "train.validation.every=null",
)
"""What leaves at step 3, where runs are saved, is for step 5; of `slow` one block is due at a time."""
MATRICES = "optim.groups.matrices={rule: muon, match: ['*.gate.weight','*.up.weight','*.down.weight']}"
EXACT = {
    "dp2 zero 1": ("parallel.zero=1",),
    "pp2": ("parallel.pp=2",),
}
ROUNDED = {
    "zero 0": ("model.cms.levels.mid.wire=bf16", "model.cms.levels.slow.wire=int8"),
    "zero 1": ("model.cms.levels.mid.wire=int8", "model.cms.levels.slow.wire=bf16", "parallel.zero=1"),
    "zero 1, many sets": ("model.cms.levels.mid.wire=int8", "parallel.zero=1"),
    "matrices": ("model.cms.levels.mid.wire=int4", "model.cms.levels.slow.wire=int8", MATRICES),
}


def check_updaters(rank: int) -> None:
    mesh = Mesh.over_all(Layout(dp=2))
    for rule, updater in (("adamw", ReplicatedAdamW), ("adamw", partial(ZeroAdamW, stage=1)), ("muon", None)):
        settings = {"mesh": mesh} | ({} if updater is None else {"updater": updater})
        run, twin = make(rule, **settings), Twin(rule, replicas=2)
        for step in range(1, STEPS + 1):
            torch.testing.assert_close(take(run, step), twin.step(step), rtol=1e-5, atol=0)
            for name, weight in twin.weights.items():
                torch.testing.assert_close(
                    run.parameters[name].detach(), weight.detach(), msg=lambda m, at=(rule, step, name): f"{at}: {m}"
                )
        kept = [run.accumulated_grad(name).clone() for name in CADENCES]
        for name, total in zip(CADENCES, kept, strict=True):
            torch.testing.assert_close(total, twin.gathered[name][rank], msg=lambda m, name=name: f"{name}: {m}")


def train(rank: int, folder: Path) -> None:
    check_updaters(rank)
    parallel_state.destroy_model_parallel()
    for name, settings in (EXACT | ROUNDED).items():
        with patch.object(updates, "EVEN_ELEMENTS", 1 if name == "zero 1, many sets" else updates.EVEN_ELEMENTS):
            train_run(folder / name / "whole", 2, *LATE, *settings)
            if rank == 0:
                fork(folder / name / "whole", folder / name / "parts", step=3)
            dist.barrier()
            # What left before is not in the bytes of this start.
            train_run(folder / name / "parts", 2, *LATE, *settings, planned=False)


def test_two_ranks_equal_one_and_a_run_goes_on_in_mid_lag(tmp_path: Path):
    """Bytes are the plan's, of all runs; rounded sums are held to a loop that rounds each replica's."""
    run_ranks(train, 2, tmp_path, tmp_path, limit_s=400)
    for name in (*EXACT, *ROUNDED):
        whole, parts = tmp_path / name / "whole", tmp_path / name / "parts"
        assert any(".sent." in key for key in saved(whole, 3)), name
        assert values(whole) == values(parts), f"{name}: resumed in mid-lag"
        ended = saved(parts)
        assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(whole).items()), name
    single = tmp_path / "single"
    train_run(single, 1, *LATE)
    moved = tmp_path / "moved"
    fork(tmp_path / "dp2 zero 1" / "whole", moved, step=3)
    train_run(moved, 1, *LATE)
    for run in (*(tmp_path / name / "whole" for name in EXACT), moved):
        assert values(run) == pytest.approx(values(single), rel=1e-5), run
        assert worst(weights(run), weights(single))[0] <= 1e-5, run


def test_a_checkpoint_that_lacks_a_sum_on_its_way_is_refused(tmp_path: Path):
    run, read = tmp_path / "run", state.read_manifest
    train_run(run, 1, *LATE, last_step=3)

    def without(folder: Path) -> Manifest:
        found = read(folder)
        return replace(found, tensors={name: each for name, each in found.tensors.items() if ".sent." not in name})

    with (
        patch.object(state, "read_manifest", without),
        pytest.raises(CheckpointError, match=r"lacks the sum of blocks\.0\.cms\.levels\.mid\.\S+ that waits") as caught,
    ):
        train_run(run, 1, *LATE)
    assert "after step 3" in caught.value.message and "--reset-optimizer" in caught.value.hint
