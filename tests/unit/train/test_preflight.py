from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from hopescale.common.rank_info import RankInfo
from hopescale.parallel.bandwidth import LinkTimes, _rounds
from hopescale.train import preflight
from hopescale.train.preflight import check_nodes, exclude, judge_faults, judge_links

NODES = ["n1", "n2", "n3", "n4"]
NAMES = {rank: f"n{rank // 2 + 1}" for rank in range(8)}


def test_a_node_is_bad_by_what_its_ranks_find_or_by_their_silence():
    faults = {rank: [] for rank in range(8)}
    assert judge_faults(NAMES, faults, NODES).bad == {}
    assert judge_faults(NAMES, faults | {5: ["/local: Read-only file system"]}, NODES).bad == {
        "n3": "/local: Read-only file system"
    }
    silent = {rank: [] for rank in range(7)}
    assert list(judge_faults(NAMES, silent, NODES).bad) == ["n4"]
    absent = {rank: name for rank, name in NAMES.items() if rank not in (2, 3, 6)}
    bad = judge_faults(absent, {rank: [] for rank in absent}, NODES).bad
    assert bad == {
        "n2": "2 ranks did not start within 120 s",
        "n4": "1 ranks did not start within 120 s",
    }


def test_what_is_wrong_everywhere_is_no_nodes_fault():
    verdict = judge_faults(NAMES, {rank: ["/run: only 0B free"] for rank in range(8)}, NODES)
    assert verdict.bad == {} and verdict.shared == [f"{node}: /run: only 0B free" for node in NODES]
    alone = judge_faults({0: "n1"}, {0: ["cuda:0: a product of float32 matrices is wrong"]}, ["n1"])
    assert list(alone.bad) == ["n1"]


def links(*, within=None, pairs=None, bandwidth=1e9):
    """Links of ranks 0 to 7: `within` by rank, `pairs` by two nodes."""
    found = {rank: LinkTimes(0.01, {}, bandwidth) for rank in range(8)}
    for number, node in enumerate(NODES):
        for other in (NODES[number - 1], NODES[(number + 1) % 4]):
            found[2 * number].pairs[other] = (pairs or {}).get(frozenset((node, other)), 0.1)
    for rank, seconds in (within or {}).items():
        found[rank].within = seconds
    return found


def test_a_slow_node_is_told_from_its_neighbours():
    assert judge_links(NAMES, links()).bad == {}
    assert "all-reduce 953.7MiB/s" in judge_links(NAMES, links()).summary
    slow = {frozenset(("n2", "n3")): 0.9, frozenset(("n3", "n4")): 0.8}
    verdict = judge_links(NAMES, links(pairs=slow))
    assert verdict.bad == {"n3": "an exchange with its neighbours takes 800 ms, the median of nodes is 100 ms"}
    one_link = judge_links(NAMES, links(pairs={frozenset(("n2", "n3")): 0.9}))
    assert one_link.bad == {}
    assert list(judge_links(NAMES, links(within={6: 0.2, 7: 0.2})).bad) == ["n4"]
    broken = {frozenset(("n2", "n3")): math.inf, frozenset(("n3", "n4")): math.inf}
    found = links(pairs=broken, bandwidth=None)
    assert judge_links(NAMES, found).bad == {"n3": "an exchange with its neighbours fails"}
    found.pop(2)
    assert sorted(judge_links(NAMES, found).bad) == ["n2", "n3"]


def test_a_failure_without_a_culprit_blames_nobody():
    two = {0: "n1", 1: "n2"}
    broken = {0: LinkTimes(None, {"n2": math.inf}), 1: LinkTimes(None, {"n1": math.inf})}
    verdict = judge_links(two, broken)
    assert verdict.bad == {} and len(verdict.shared) == 2
    slow = {0: LinkTimes(None, {"n2": 5.0}, 1e9), 1: LinkTimes(None, {"n1": 5.0}, 1e9)}
    assert judge_links(two, slow).bad == {}
    wrong = judge_links(NAMES, links(bandwidth=None))
    assert wrong.bad == {} and "wrong sums" in wrong.shared[0]


def test_each_node_of_the_ring_meets_its_two_neighbours_one_at_a_time():
    assert _rounds(["a"]) == [] and _rounds(["a", "b"]) == [[("a", "b")]]
    for count in range(3, 8):
        names = [str(number) for number in range(count)]
        rounds = _rounds(names)
        for edges in rounds:
            met = [name for pair in edges for name in pair]
            assert len(met) == len(set(met))
        met = sorted(name for edges in rounds for pair in edges for name in pair)
        assert met == sorted(names * 2) and len({frozenset(pair) for edges in rounds for pair in edges}) == count


def test_one_process_checks_its_device_and_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = [tmp_path / "run", tmp_path / "local"]
    verdict = check_nodes(None, "n1", ["n1"], "cpu", folders, {})
    assert (verdict.bad, verdict.shared) == ({}, []) and not list((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}: " in check_nodes(None, "n1", ["n1"], "cpu", [tmp_path / "file"], {}).bad["n1"]
    monkeypatch.setattr(preflight, "_FREE_DISK", 2**60)
    assert "only " in check_nodes(None, "n1", ["n1"], "cpu", folders, {}).bad["n1"]
    monkeypatch.setattr(preflight.torch, "equal", lambda a, b: False)
    assert "a product of torch.float32 matrices is wrong" in check_nodes(None, "n1", ["n1"], "cpu", [], {}).bad["n1"]


def test_excluded_nodes_add_up(tmp_path: Path):
    exclude(tmp_path, ["n3"])
    exclude(tmp_path, ["n1", "n3"])
    assert (tmp_path / "bad_nodes").read_text() == "n3\nn1\n"


def test_a_product_on_a_device_shows_rows_and_columns_that_are_swapped():
    a, b = preflight._whole_numbers(256)
    product = a @ b
    assert all(len(x.unique(dim=dim)) == 256 for x in (a, b, product) for dim in (0, 1))
    assert product.abs().max() < 256 and (a.abs() @ b.abs()).max() < 256


def test_the_links_of_a_node_with_one_process_are_measured_on_an_indexed_device(monkeypatch: pytest.MonkeyPatch):
    started: list[tuple[object, str | None]] = []
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 8)

    def start(rank_info: RankInfo, device: torch.device, *_: object) -> None:
        started.append((device, os.environ.get("TORCH_NCCL_BLOCKING_WAIT")))

    monkeypatch.setattr(preflight.process, "start", start)
    monkeypatch.setattr(preflight, "measure", lambda *_: LinkTimes())
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    preflight._measure(RankInfo(1, 2, 0, "node1", 15_000), "cuda", ["n1", "n2"], None, None)
    # NCCL raises where an exchange hangs, instead of waiting on the device; afterwards all is as it was.
    assert started == [(torch.device("cuda", 0), "1")] and os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"
