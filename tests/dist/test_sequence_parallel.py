"""Residual activations split over ranks along the tokens change nothing: loss, logits and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hopescale.config.layout import Layout
from hopescale.models import Model
from hopescale.parallel.layers import cross_entropy_sum
from hopescale.parallel.mesh import Mesh
from tests.support.models import BASE
from tests.support.ranks import run_ranks
from tests.support.split import VARIANTS, Batch, check_split


def check_sequence_parallel(rank: int, tp: int) -> None:
    mesh, batch = Mesh.over_all(Layout(tp=tp, sequence_parallel=True)), Batch(20)
    for name in VARIANTS:
        check_split(name, mesh, batch, ("none", "block", "memory"))
    check_state_and_last_only(mesh, batch)
    check_slices(mesh, batch)
    check_uneven_tokens(mesh)


def check_state_and_last_only(mesh: Mesh, batch: Batch) -> None:
    model = Model(BASE, mesh=mesh)
    with torch.no_grad():
        whole, _ = model(batch.tokens)
        _, state = model(batch.tokens[:, :8])
        last, state = model(batch.tokens[:, 8:], state, last_only=True)
    assert state.position == 20
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-5)


def check_slices(mesh: Mesh, batch: Batch) -> None:
    _, logits, gradients = batch.run(Model(BASE, mesh=mesh))
    first, last = (Model(BASE, mesh=mesh, blocks=blocks) for blocks in (range(1), range(1, 2)))
    hidden, _ = first(batch.tokens)
    assert hidden.shape == (20 // mesh.tp_group.size(), 2, BASE.d_model)
    assert hidden.is_contiguous()
    chained, _ = last(None, hidden=hidden)
    torch.testing.assert_close(chained, logits, rtol=0, atol=0)
    cross_entropy_sum(chained, batch.targets, mesh).backward()
    found = {name: p.grad for part in (first, last) for name, p in part.named_parameters() if name in gradients}
    tied = first.embedding.weight.grad + last.embedding.weight.grad
    for name, gradient in (found | {"embedding.weight": tied}).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def check_uneven_tokens(mesh: Mesh) -> None:
    with pytest.raises(ValueError, match="21 tokens cannot be split evenly"):
        Model(BASE, mesh=mesh)(Batch(21).tokens)


@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_model_equals_whole_model(tp: int, tmp_path: Path):
    run_ranks(check_sequence_parallel, tp, tmp_path, tp)
