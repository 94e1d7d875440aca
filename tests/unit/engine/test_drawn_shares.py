"""Replicas that share out the weights of blocks draw each its share, of the same model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch

from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.engine.node_weights import defer_blocks
from hopescale.engine.zero import ZeroAdamW
from hopescale.models import Model
from hopescale.models.init import initial_values, initialize
from hopescale.optim import OuterOptimizer
from hopescale.parallel.deferred import is_deferred
from tests.support.layouts import TINY
from tests.support.many_ranks import Group, mesh_of

NODES, PER_NODE, SEED = 3, 2, 7
MATRICES = "optim.groups.matrices={rule: m3, match: ['*_proj.weight', '*.gate.weight', '*.up.weight', '*.down.weight']}"


def optimizer_of(replica: int, config: RunConfig, dtype: torch.dtype, drawn: list[int]) -> OuterOptimizer:
    """Start a replica of three nodes of two; `drawn` gets the numbers of entries of blocks."""
    node, place = divmod(replica, PER_NODE)
    mesh = replace(
        mesh_of(Group(NODES * PER_NODE, replica)),
        node_group=Group(PER_NODE, place),
        nodes_group=Group(NODES, node),
    )

    def draw(*args: object) -> torch.Tensor:
        values = initial_values(*args)
        drawn.append(values.numel())
        return values

    model = Model(config.model, seed=None, mesh=mesh)
    with patch("hopescale.engine.node_weights.initial_values", draw):
        defer_blocks(model, dtype, torch.device("cpu"), SEED)
        initialize(model, SEED, mesh)
        parameters = dict(model.to_precision(dtype).named_parameters())
        levels = list(model.level_parameters().values())
        optimizer = OuterOptimizer(
            parameters,
            config.optim,
            config.train.steps,
            {},
            mesh=mesh,
            updater=partial(ZeroAdamW, stage=1, levels=levels),
            levels=levels,
            shared=[[name for name in parameters if name.startswith(f"blocks.{n}.")] for n in model.blocks],
        )
    assert not any(map(is_deferred, parameters.values()))
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["adamw", "m3"])
def test_a_replica_draws_what_it_keeps_of_the_model_of_one_process(rule: str, dtype: torch.dtype):
    drawn: list[list[int]] = [[] for _ in range(NODES * PER_NODE)]
    config = load_recipe("debug", [*TINY, *([MATRICES] if rule == "m3" else [])]).config
    ranks = [optimizer_of(replica, config, dtype, drawn[replica]) for replica in range(NODES * PER_NODE)]
    one = Model(config.model, seed=SEED).to_precision(dtype)
    expected = {name: parameter.detach() for name, parameter in one.named_parameters()}
    for first in range(0, len(ranks), PER_NODE):
        for flats in zip(*(optimizer.node_flats() for optimizer in ranks[first : first + PER_NODE]), strict=True):
            assert not any(flat.has_memory for _, flat in flats)
            flats[0][1].make_room()
            flats[0][1].flat.copy_(torch.cat([flat.share for _, flat in flats]))
        for name, parameter in ranks[first].parameters.items():
            assert parameter.dtype == expected[name].dtype and parameter.equal(expected[name]), name
    held: Counter[str] = Counter()
    for updater in (updater for optimizer in ranks for updater in optimizer.updaters):
        for name, master in zip(updater.parameters, updater.masters([*updater.parameters]), strict=True):
            start = updater._set_of[name].start_of(name) if isinstance(updater, ZeroAdamW) else 0
            assert master.flatten().equal(expected[name].float().flatten()[start : start + master.numel()]), name
            held[name] += master.numel()
    assert held == {name: weight.numel() for name, weight in expected.items()}
    blocks = {name: weight.numel() for name, weight in expected.items() if name.startswith("blocks.")}
    matrices = sum(size for name, size in blocks.items() if ranks[0].groups[name] == "matrices")
    assert (matrices > 0) == (rule == "m3")
    # Of matrices an owner draws those that it updates besides.
    assert sum(map(sum, drawn)) == NODES * sum(blocks.values()) + matrices
    for entries, optimizer in zip(drawn, ranks, strict=True):
        assert sum(entries) <= sum(flat.share.numel() for _, flat in optimizer.node_flats()) + matrices
