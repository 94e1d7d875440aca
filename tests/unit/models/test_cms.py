"""The levels: a Transformer's MLP when there is one, a chain or a weighted sum when there are more."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hopescale.config.schema import CmsConfig, LevelConfig, ModelConfig
from hopescale.models.cms import ContinuumMemory
from hopescale.models.init import initialize
from hopescale.parallel.mesh import Mesh

WIDTH = 8
LEVELS = {
    "fast": LevelConfig(d_ff=6),
    "mid": LevelConfig(d_ff=4, update_every_steps=2),
    "slow": LevelConfig(d_ff=10, update_every_steps=8),
}


def make_cms(levels: dict[str, LevelConfig], variant: str) -> ContinuumMemory:
    config = ModelConfig(d_model=WIDTH, cms=CmsConfig(variant=variant))
    cms = ContinuumMemory(config, levels, out_scale=0.7, mesh=Mesh.alone())
    initialize(cms, 0, Mesh.alone())
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in cms.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return cms.double()


def normed(x, norm):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * norm.weight


def mlp(level, x):
    return (F.silu(x @ level.gate.weight.T) * (x @ level.up.weight.T)) @ level.down.weight.T


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_one_level_is_the_mlp_of_a_transformer_block(x, variant: str):
    cms = make_cms({"mlp": LevelConfig(d_ff=6)}, variant)
    level = cms.levels["mlp"]
    added = mlp(level, normed(x, level.norm if variant == "sequential" else cms.norm))
    weight = 1.0 if variant == "sequential" else cms.mix[0]
    torch.testing.assert_close(cms(x), x + weight * added)


def test_sequential_is_a_chain_from_fast_to_slow(x):
    cms = make_cms(LEVELS, "sequential")
    y = x
    for name in ("fast", "mid", "slow"):
        y = y + mlp(cms.levels[name], normed(y, cms.levels[name].norm))
    torch.testing.assert_close(cms(x), y)


def test_independent_is_a_weighted_sum(x):
    cms = make_cms(LEVELS, "independent")
    shared = normed(x, cms.norm)
    parts = [mlp(cms.levels[name], shared) for name in ("fast", "mid", "slow")]
    torch.testing.assert_close(cms(x), x + sum(w * p for w, p in zip(cms.mix, parts, strict=True)))
