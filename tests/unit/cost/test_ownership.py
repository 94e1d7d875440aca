"""Shares of the work are of about equal cost, whatever is distributed."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hopescale.config.schema import DeepMomentumConfig, M3Config, MuonConfig, OptimConfig
from hopescale.cost import updates
from hopescale.cost.updates import (
    Work,
    assign_owners,
    buckets,
    even_sets,
    matrix_sets,
    orthogonal_flops,
    update_cost,
)
from hopescale.ops.device import DTYPES
from hopescale.optim.muon import orthogonal
from hopescale.optim.ownership import Ownership
from hopescale.optim.rules import RULES


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_no_owner_has_more_than_the_mean_and_one_update(owners: int, seed: int):
    draw = random.Random(seed)
    shapes = {(draw.randint(1, 9), draw.randint(1, 9)): 10 ** draw.uniform(0, 3) for _ in range(5)}
    work = [
        Work(f"{due}.{i}", shapes[shape], shape, due)
        for due in ("fast", "slow")
        for i, shape in enumerate(draw.choices(list(shapes), k=draw.randint(1, 60)))
    ]
    result = assign_owners(work, owners)
    assert result.keys() == {each.name for each in work} and set(result.values()) <= set(range(owners))
    for due in ("fast", "slow"):
        members = [each for each in work if each.due == due]
        load = Counter()
        for each in members:
            load[result[each.name]] += each.cost
        mean = sum(each.cost for each in members) / owners
        assert max(load.values()) <= mean + max(each.cost for each in members) * (1 + 1e-9)
    assert assign_owners(work, owners) == result


def test_equal_shapes_are_shared_evenly_and_in_runs():
    work = [Work(f"a{i}", 5.0, "a") for i in range(8)] + [Work(f"b{i}", 1.0, "b") for i in range(8)]
    result = assign_owners(work, 4)
    assert {Counter(result[f"{shape}{i}"] for i in range(8))[owner] for shape in "ab" for owner in range(4)} == {2}
    assert [result[f"a{i}"] for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_is_due_apart_begins_with_the_owner_that_has_least():
    result = assign_owners([Work("fast", 1.0, "a", 1), Work("slow", 1.0, "a", 2)], 2)
    assert result == {"fast": 0, "slow": 1}


def test_buckets_hold_all_in_order_and_no_part_exceeds_the_room():
    owners = {name: index % 3 for index, name in enumerate("abcdefghij")}
    sizes = dict(zip("abcdefghij", [4, 1, 9, 3, 2, 2, 8, 1, 1, 5], strict=True))
    cut = buckets("abcdefghij", owners, sizes, 7)
    assert sorted("".join(name for bucket in cut for name in bucket)) == list("abcdefghij")
    for bucket in cut:
        for owner in range(3):
            part = [name for name in bucket if owners[name] == owner]
            assert len(part) == 1 or sum(sizes[name] for name in part) <= 7
    assert buckets("abcdefghij", owners, sizes, 1000) == [list("abcdefghij")]
    assert buckets([], owners, sizes, 7) == []


def test_sets_are_cut_in_the_order_of_a_backward_pass_and_a_large_first_parameter_is_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    sizes = {"embedding": 40, **{f"block{number}": 30 for number in range(5)}, "norm": 1}
    assert even_sets(sizes, 191) == [[*sizes]], "a small model is not cut"
    monkeypatch.setattr(updates, "EVEN_ELEMENTS", 1)
    # A tenth of all is 70.
    assert even_sets(sizes, 700) == [["block3", "block4", "norm"], ["block1", "block2"], ["block0"], ["embedding"]]
    few = {"embedding": 10, "block0": 30, "norm": 1}
    assert even_sets(few, 700) == [[*few]], "a small one is not"
    assert even_sets({"embedding": 900}, 900) == [["embedding"]]
    large = {f"block{number}": 1000 for number in range(100)}
    assert len(even_sets(large, 100_000)) <= 11, "their number does not grow with the model"


def test_matrices_are_cut_into_sets_from_the_last_block_on(monkeypatch: pytest.MonkeyPatch):
    sizes = {f"block{number}": 30 for number in range(5)}
    assert matrix_sets(sizes, 150) == [[*reversed(sizes)]], "few are not cut"
    monkeypatch.setattr(updates, "EVEN_ELEMENTS", 1)
    # An eighth of all is 60.
    assert matrix_sets(sizes, 480) == [["block4", "block3"], ["block2", "block1"], ["block0"]]


def owned(sizes: dict[str, int], replica: dict[str, int], tp_rank: dict[str, int]) -> SimpleNamespace:
    """Owners of matrices that are updated as so many entries, on two tensor-parallel ranks."""
    shapes = {name: (size, 1) for name, size in sizes.items()}
    return SimpleNamespace(replica=replica, tp_rank=tp_rank, shape=shapes, _tp=2)


def test_rounds_are_cut_where_any_rank_has_too_much():
    owners = owned({"a": 6, "b": 3, "c": 3, "d": 5, "e": 20}, {"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}, {})
    classes = {3: ["a", "b"], 4: ["c"], 7: ["d"], 8: ["e"]}
    assert Ownership.rounds(owners, classes, 10) == [[3, 4], [7], [8]]
    assert Ownership.rounds(owners, classes, 100) == [[3, 4, 7, 8]]
    assert Ownership.rounds(owners, {}, 10) == []
    wholes = owned({"a": 6, "b": 6, "c": 6}, dict.fromkeys("abc", 0), {"a": 0, "b": 1, "c": 1})
    assert Ownership.rounds(wholes, {0: ["a"], 1: ["b"], 2: ["c"]}, 10) == [[0, 1], [2]]


def test_costs_follow_shape_and_settings():
    config = OptimConfig()
    for rule in RULES:
        single = update_cost(rule, (8, 16), config)
        assert update_cost(rule, (3, 8, 16), config) == pytest.approx(3 * single)
        assert update_cost(rule, (16, 16), config) > single > 0
    assert update_cost("muon", (8, 16), config) == update_cost("muon", (16, 8), config)
    assert update_cost("m3", (8, 16), config) > update_cost("m3", (8, 16), OptimConfig(m3=M3Config(alpha_slow=0.0)))
    small = OptimConfig(deep_momentum=DeepMomentumConfig(memory_dim=4))
    assert update_cost("deep_momentum", (8, 16), small) < update_cost("deep_momentum", (8, 16), config)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (33, 8)])
def test_flops_of_orthogonal_matrices_are_those_that_torch_counts(shape: tuple[int, int], method: str, dtype: str):
    settings = MuonConfig(orthogonalize=method, ns_dtype=dtype, ns_steps=3)
    with FlopCounterMode(display=False) as counter:
        orthogonal([torch.ones(shape)], method, ns_steps=3, ns_dtype=DTYPES[dtype])
    assert orthogonal_flops(*shape, settings) == counter.get_total_flops()
    assert orthogonal_flops(64, 256, MuonConfig(orthogonalize="polar_express")) < 0.6 * orthogonal_flops(
        64, 256, MuonConfig()
    )
