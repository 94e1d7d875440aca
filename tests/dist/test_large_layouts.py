"""Ranks of large layouts, built on the meta device behind a process group that sends nothing, hold what is planned."""

from __future__ import annotations

import resource
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.holdings import Holdings
from hopescale.cost.params import model_parameters
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from tests.support.ranks import run_ranks

LAYOUTS = {
    "hope_1.3b": (Layout(dp=16, tp=2, pp=2), Layout(dp=8, tp=1, pp=4, virtual_stages=2)),
    "hope_7b": (Layout(dp=16, tp=8, pp=2, sequence_parallel=True), Layout(dp=64, tp=4)),
    "hope_70b": (Layout(dp=8, tp=8, pp=16, sequence_parallel=True), Layout(dp=32, tp=8, pp=4)),
}
"""Of each size, up to 1,024 ranks."""


def fake_mesh(layout: Layout, rank: int) -> Mesh:
    """The mesh of one rank of many, which are not there."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_ranks)
    real = dist.new_group

    def fake(*arguments, **options):
        return real(*arguments, **options | {"backend": "fake"})

    with patch.object(dist, "new_group", fake):
        return Mesh.over_all(layout)


def check_layout(_: int, recipe: str, layout: Layout) -> None:
    config = load_recipe(recipe).config
    holdings = Holdings(config)
    for stage in sorted({0, layout.pp // 2, layout.pp - 1}):
        rank = stage * layout.dp * layout.tp + layout.tp - 1
        mesh = fake_mesh(layout, rank)
        slices = holdings.slices(layout, stage)
        with torch.device("meta"):
            built = [Model(config.model, mesh=mesh, blocks=blocks) for blocks in slices]
        found = {name: tuple(p.shape) for model in built for name, p in model.named_parameters()}
        planned = {p.name: p.slice(layout.tp).shape for p in model_parameters(config.model, slices)}
        assert found == planned, f"stage {stage}"
        total = sum(p.numel() for p in {name: p for m in built for name, p in m.named_parameters()}.values())
        assert holdings.of_stage(layout, stage).total() == total
        parallel_state.destroy_model_parallel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < 2, f"{peak:.1f} GiB are resident, for weights that were not to be allocated"


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_ranks_hold_what_is_planned(recipe: str, tmp_path: Path):
    for layout in LAYOUTS[recipe]:
        run_ranks(check_layout, 1, tmp_path, recipe, layout)
