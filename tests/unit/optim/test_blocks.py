"""Fused projections as several matrices to a rule, against a loop that takes the rows out one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hopescale.common.errors import ConfigError
from hopescale.config.schema import GroupConfig, MuonConfig, OptimConfig
from hopescale.cost.updates import block_rows
from hopescale.optim import OuterOptimizer
from hopescale.optim.m3 import M3
from hopescale.optim.muon import Muon
from hopescale.optim.rules import refuse_idle_blocks
from hopescale.optim.stacked import StackedOptimizer
from hopescale.parallel.layers import ParameterSpec, attach

PARTS = ((2, 3), (1, 3), (1, 1))
"""Two slices of queries, one of keys, and a number: 10 rows of each of the groups."""
GROUPS = 3
RULES = pytest.mark.parametrize(
    ("rule", "settings"), [(Muon, {"adjust_lr_fn": "original"}), (M3, {"frequency": 2})], ids=["muon", "m3"]
)
BLOCKS = pytest.mark.parametrize("blocks", ["heads", "projections"])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of_blocks(blocks: str, groups: int = GROUPS) -> list[list[int]]:
    """Return the rows of each matrix, by a loop over groups, slices and channels."""
    found: dict[tuple, list[int]] = {}
    row = 0
    for group in range(groups):
        for part, (count, width) in enumerate(PARTS):
            for slice_ in range(count):
                for _ in range(width):
                    found.setdefault((part, group, slice_) if blocks == "heads" else (part,), []).append(row)
                    row += 1
    return list(found.values())


def train(rule: type[StackedOptimizer], weights: list[Tensor], rows: list[int] | slice, blocks: str, **settings):
    members = [nn.Parameter(weight[rows].clone()) for weight in weights]
    for member in members:
        member.parts = PARTS
    optimizer = rule(members, lr=0.1, blocks=blocks, ns_dtype=torch.float64, **settings)
    for step in range(3):
        for index, (member, weight) in enumerate(zip(members, weights, strict=True)):
            member.grad = randn(*weight.shape, seed=10 * step + index)[rows]
        optimizer.step()
    return torch.stack([member.detach() for member in members])


@RULES
@BLOCKS
@pytest.mark.parametrize(("number", "groups"), [(1, GROUPS), (2, GROUPS), (2, 1)])
def test_each_block_is_updated_as_a_matrix_of_its_own(rule, settings, blocks: str, number: int, groups: int):
    """A tensor-parallel rank may have a single group."""
    weights = [randn(10 * groups, 7, seed=90 + index) for index in range(number)]
    found = train(rule, weights, slice(None), blocks, **settings)
    expected = torch.zeros_like(found)
    for rows in rows_of_blocks(blocks, groups):
        expected[:, rows] = train(rule, weights, rows, "matrix", **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - train(rule, weights, slice(None), "matrix", **settings)).abs().max() > 1e-3


@RULES
def test_heads_of_a_slice_are_updated_as_in_the_whole(rule, settings):
    """So that tensor-parallel ranks, each with some of the heads, need nothing of one another."""
    weights = [randn(10 * GROUPS, 7, seed=90)]
    whole = train(rule, weights, slice(None), "heads", **settings)
    torch.testing.assert_close(whole[:, 10:], train(rule, weights, slice(10, None), "heads", **settings))


def test_costs_know_the_blocks():
    for blocks in ("heads", "projections"):
        sizes = sorted(len(rows) for rows in rows_of_blocks(blocks))
        found = block_rows(10 * GROUPS, PARTS, blocks)
        assert sorted(rows for count, rows in found for _ in range(count)) == sizes
    assert block_rows(30, (), "heads") == block_rows(30, PARTS, "matrix") == [(1, 30)]


def test_blocks_without_a_fused_projection_are_refused():
    config = OptimConfig(groups={"all": GroupConfig(rule="muon")}, muon=MuonConfig(blocks="heads"))
    with pytest.raises(ConfigError, match="optim.muon.blocks is heads, but no group with rule: muon has a fused"):
        refuse_idle_blocks({"a": "all"}, [], config)
    refuse_idle_blocks({"a": "all", "on_another_stage": "all"}, ["on_another_stage"], config)


def test_a_stage_without_a_fused_projection_is_built():
    config = OptimConfig(groups={"all": GroupConfig(rule="muon")}, muon=MuonConfig(blocks="heads"))
    OuterOptimizer({"a": attach(nn.Parameter(torch.ones(4, 4)), ParameterSpec())}, config, 10, {})
