"""What a rank of 64, 256 and 1,024 makes at its start and exchanges in a step: nothing that grows with their number."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.parallel import mesh
from hopescale.parallel.mesh import Mesh
from tests.support.many_ranks import Group, Rank

LINEAR = "['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']"
MATRICES = f"optim.groups.matrices={{rule: m3, match: {LINEAR}}}"


@pytest.mark.parametrize(
    ("replicas", "rule", "layers"), [(64, "adamw", 6), (256, "m3", 6), (1024, "m3", 24), (1024, "adamw", 24)]
)
def test_a_step_of_one_rank_of_many(replicas: int, rule: str, layers: int):
    settings = ["parallel.zero=1", f"model.num_layers={layers}", *([MATRICES] if rule == "m3" else [])]
    rank = Rank(load_recipe("hope_1.3b", settings).config, replicas)
    step = max(cadence.period for cadence in rank.optimizer.cadences.values())
    found, operations = rank.step(step)
    due = rank.due(step)
    assert due == sum(parameter.numel() for parameter in rank.parameters.values())
    assert sum(found.calls.values()) <= 40, found.calls
    assert found.largest <= 256 * 2**20
    assert 1 <= found.sent["reduce_scatter_tensor"] / (4 * due) <= 1.05
    assert found.host_reads == 0
    assert operations <= 100
    fast, _ = rank.step(1)
    # All but the embedding, whose gradient is the last one.
    last = rank.parameters["embedding.weight"].numel()
    assert found.early >= 4 * (due - last) and fast.early >= 4 * (rank.due(1) - last)
    if layers == 24:
        assert min(found.early / due, fast.early / rank.due(1)) >= 0.9 * 4
        assert min(found.overlapped / due, fast.overlapped / rank.due(1)) >= 0.4 * 4, "not all at the end"
    assert fast.sent["reduce_scatter_tensor"] < 0.7 * found.sent["reduce_scatter_tensor"] and fast.host_reads == 0


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("m3", ["optim.m3.ns_dtype=bf16"]),
        ("muon", ["optim.muon.ns_dtype=bf16"]),
        ("delta_momentum", []),
        ("dgd", []),
        ("deep_momentum", ["optim.deep_momentum.objective=l2", "optim.deep_momentum.update_rms=0.2"]),
        ("deep_momentum", ["optim.deep_momentum.objective=l2", "optim.deep_momentum.memory=linear"]),
    ],
)
def test_the_rank_with_most_classes_updates_in_few_operations(rule: str, settings: list[str]):
    """In the type in which a GPU iterates, and when the slow memory of M3 is read anew."""
    group = f"optim.groups.matrices={{rule: {rule}, match: {LINEAR}}}"
    config = load_recipe("hope_1.3b", ["parallel.zero=1", group, *settings]).config
    first = Rank(config, 64).optimizer.updaters[-1]
    owners = Counter(
        owner for each in first.classes for owner in {first.ownership.replica[name] for name in each.names}
    )
    ((fullest, most),) = owners.most_common(1)
    assert most == (4 if rule == "dgd" else 5)
    rank = Rank(config, 64, fullest)
    for _ in range(4 if rule == "m3" else 1):
        found, operations = rank.step(16)
        assert operations <= 100 and sum(found.calls.values()) <= 40
        assert found.largest <= 256 * 2**20


def test_a_step_without_shards_sums_in_few_buckets():
    rank = Rank(load_recipe("hope_1.3b", ["parallel.zero=0"]).config, 1024)
    found, operations = rank.step(16)
    due = rank.due(16)
    assert operations <= 100
    assert found.calls.keys() == {"all_reduce"} and found.calls["all_reduce"] <= 40
    assert found.largest <= 256 * 2**20 and found.host_reads == 0
    assert found.sent["all_reduce"] == pytest.approx(4 * due, rel=1e-6)
    assert found.early >= 0.9 * 4 * due


def test_of_slow_levels_a_node_alone_hears_until_they_are_due():
    """Inside a node all gradients are summed at every step; what a rank keeps of them are shares of a node."""
    rank = Rank(load_recipe("hope_1.3b", ["parallel.shard=node", "model.num_layers=2"]).config, 64)
    (updater,) = rank.optimizer.updaters
    total, sent = sum(p.numel() for p in rank.parameters.values()), {}
    for step in (1, 16):
        found, _ = rank.step(step)
        sent[step] = found.sent["reduce_scatter_tensor"] / 4, rank.due(step)
        assert not any(name for name, each in updater.accumulators.items() if each.total is not None)
    for step, (entries, due) in sent.items():
        assert entries == pytest.approx(total + due / 8, rel=0.01), f"step {step}"
    held = sum(shards._held.numel() for shards in updater._sets)
    assert held == pytest.approx(total / 8, rel=0.01)


@pytest.mark.parametrize("rule", ["adamw", "m3"])
def test_of_the_weights_of_blocks_a_rank_keeps_its_share_of_a_node(rule: str):
    """A step hands parts on to the shares of all nodes; inside a node it gathers what lies outside of blocks."""
    nodes = ["parallel.shard=node", "parallel.shard_weights=true", "model.num_layers=2"]
    rank = Rank(load_recipe("hope_1.3b", [*nodes, *([MATRICES] if rule == "m3" else [])]).config, 64)
    whole, shares = rank.optimizer.copies()
    outside, total = (sum(p.numel() for p in each.values()) for each in (whole, rank.parameters))
    assert sum(share.numel() for share in shares.values()) == pytest.approx((total - outside) / 8, rel=0.01)
    assert all(name.startswith("blocks.") == (name not in whole) for name in rank.parameters)
    assert not any(flat.has_memory for _, flat in rank.optimizer.node_flats())
    found, _ = rank.step(16)
    assert rank.due(16) == total
    # In bfloat16; what lies outside is gathered in both tiers.
    assert found.sent["all_gather_into_tensor"] == pytest.approx(2 * (total / 64 + outside / 8), rel=0.01)
    assert not any(flat.has_memory for _, flat in rank.optimizer.node_flats())
    # Of each block a sum for every level and type, and the weights back; loss and norms once.
    assert sum(found.calls.values()) <= 40 * 2


def start(layout: Layout, rank: int) -> list[tuple[int, ...]]:
    """Return the groups that a rank makes at its start, by their members."""
    made: list[tuple[int, ...]] = []

    def new_group(ranks: list[int] | None = None, **_: Any) -> Group:
        members = tuple(range(layout.num_ranks)) if ranks is None else tuple(ranks)
        assert rank in members, "a group of others"
        made.append(members)
        return Group(len(members), members.index(rank))

    everyone = {"is_initialized": True, "get_rank": rank, "get_world_size": layout.num_ranks}
    patched = {name: lambda *_, value=value, **__: value for name, value in everyone.items()}
    opened: list[dist.ProcessGroup] = []
    with patch.multiple(dist, new_group=new_group, **patched), patch.object(mesh, "open_rings", opened.extend):
        found = Mesh.over_all(layout)
        given = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
        assert given == (found.tp_group, found.dp_group)
        assert parallel_state.get_pipeline_model_parallel_group() is found.pp_group
        parallel_state.destroy_model_parallel()
    assert {found.control_group, found.checkpoint_group, found.dp_group} <= {*opened}
    return made


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4)], ids=str)
def test_a_start_makes_the_same_number_of_groups_at_any_number_of_ranks(shape: tuple[int, int]):
    """On every rank too: torch names a group by the number of those that a process has."""
    tp, pp = shape
    counts = set()
    for num_ranks in (64, 1024):
        layout = Layout(dp=num_ranks // (tp * pp), tp=tp, pp=pp)
        for rank in (0, num_ranks // 2, num_ranks - 1):
            made = start(layout, rank)
            counts.add(len(made))
            first = rank - rank % tp
            assert {
                tuple(range(first, first + tp)),
                tuple(range(rank % (tp * layout.dp), num_ranks, tp * layout.dp)),
            } <= {*made}
    assert len(counts) == 1 and counts.pop() <= 12
