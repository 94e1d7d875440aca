"""The model split over tensor-parallel ranks equals the model of one process: loss, logits and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hopescale.config.layout import Layout
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import share_with_ranks
from tests.support.ranks import run_ranks
from tests.support.split import VARIANTS, Batch, check_split


def check_split_model(rank: int, tp: int) -> None:
    mesh, batch = Mesh.over_all(Layout(tp=tp)), Batch(21)
    for name in VARIANTS:
        check_split(name, mesh, batch)
    check_split("hope", mesh, batch, ("block", "memory"))
    check_gradient_that_is_not_contiguous(rank, mesh)


def check_gradient_that_is_not_contiguous(rank: int, mesh: Mesh) -> None:
    x, gradient = torch.ones(2, 3, requires_grad=True), torch.arange(6.0).view(3, 2).mT
    share_with_ranks(x, mesh).backward(gradient * (rank + 1))
    ranks = mesh.tp_group.size()
    torch.testing.assert_close(x.grad, gradient * (ranks * (ranks + 1) / 2))


@pytest.mark.parametrize("tp", [2, 4])
def test_split_model_equals_whole_model(tp: int, tmp_path: Path):
    run_ranks(check_split_model, tp, tmp_path, tp)


def fail_on_one_rank(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("planted")
    dist.barrier()


def test_a_failing_rank_fails_the_test_with_its_stack(tmp_path: Path):
    with pytest.raises(AssertionError, match="planted"):
        run_ranks(fail_on_one_rank, 2, tmp_path)
