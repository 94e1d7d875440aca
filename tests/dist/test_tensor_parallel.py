"""The model split over tensor-parallel ranks equals the model of one process: loss, logits and every gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hopescale.config.layout import Layout
from hopescale.infer.adaptation import read_adaptation
from hopescale.infer.in_context import InContextReader
from hopescale.models import Model
from hopescale.ops import cross_entropy
from hopescale.parallel.layers import IGNORED_TARGET, vocabulary_share
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import share_with_ranks
from tests.support.models import BASE
from tests.support.ranks import run_ranks
from tests.support.split import VARIANTS, Batch, check_split


def check_split_model(rank: int, tp: int) -> None:
    mesh, batch = Mesh.over_all(Layout(tp=tp)), Batch(21)
    for name in VARIANTS:
        check_split(name, mesh, batch)
    check_split("hope", mesh, batch, ("block", "memory"))
    check_gradient_that_is_not_contiguous(rank, mesh)
    check_cross_entropy_in_pieces(mesh)
    for name in ("attention", "independent levels"):
        check_levels_in_context(name, mesh, batch)


def check_levels_in_context(name: str, mesh: Mesh, batch: Batch) -> None:
    """Each rank follows a text with its part of the levels' weights."""
    config, cadences = replace(BASE, **VARIANTS[name]), read_adaptation("--adapt", "fast=4,slow=9", rate=0.5)
    tp, rank = mesh.tp_group.size(), mesh.tp_group.rank()
    logits, readers = [], []
    for each in (Mesh.alone(), mesh):
        readers.append(InContextReader(Model(config, seed=2, mesh=each).double(), cadences, 2))
        logits.append(torch.cat(list(readers[-1].read(batch.tokens, batch.targets)), 1))
    torch.testing.assert_close(logits[1], logits[0].chunk(tp, -1)[rank], rtol=1e-4, atol=1e-5)
    for parameter, weight in readers[0].weights.items():
        dim = dict(readers[1].model.named_parameters())[parameter].spec.partition_dim
        expected = weight if dim is None else weight.chunk(tp, dim + 1)[rank]
        torch.testing.assert_close(readers[1].weights[parameter], expected, rtol=1e-5, atol=1e-7)


def check_gradient_that_is_not_contiguous(rank: int, mesh: Mesh) -> None:
    x, gradient = torch.ones(2, 3, requires_grad=True), torch.arange(6.0).view(3, 2).mT
    share_with_ranks(x, mesh).backward(gradient * (rank + 1))
    ranks = mesh.tp_group.size()
    torch.testing.assert_close(x.grad, gradient * (ranks * (ranks + 1) / 2))


def check_cross_entropy_in_pieces(mesh: Mesh) -> None:
    """Ranks with some columns of logits each, as on a GPU, have the loss and the gradient of all columns."""
    tp, rank, generator = mesh.tp_group.size(), mesh.tp_group.rank(), torch.Generator().manual_seed(0)
    whole, targets = 3 * torch.randn(17, 32, generator=generator), torch.randint(21, (17,), generator=generator)
    whole[:, 21:], targets[::5] = float("-inf"), IGNORED_TARGET  # the padding of the vocabulary: of a rank of 4 all
    whole.requires_grad_()
    expected = F.cross_entropy(whole, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    (expected / 7).backward()
    for logits_at_a_time in (1, 40, 1 << 20):
        cross_entropy.LOGITS_AT_A_TIME = logits_at_a_time
        mine = whole.detach().chunk(tp, -1)[rank].clone().requires_grad_()
        share = vocabulary_share(mine.shape[-1], mesh)
        found = cross_entropy.cross_entropy_in_pieces(mine, targets, ignored=IGNORED_TARGET, share=share)
        (found / 7).backward()
        torch.testing.assert_close((found, mine.grad), (expected, whole.grad.chunk(tp, -1)[rank]))


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
