"""Ranks that were started for different things and meet all the same."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo
from hopescale.config.layout import Layout
from hopescale.parallel import init_distributed as joining
from hopescale.parallel.store_exchange import StoreExchange
from tests.dist.test_preflight import check, free_port
from tests.support.ranks import run_ranks

SAME = {"the run folder": "/runs/a", "train.seed": "0", "optim.lr": "1.0e-3"}


class Counted:
    """A store that counts the bytes that a rank writes to it."""

    def __init__(self, store: dist.Store):
        self.store, self.num_bytes = store, 0

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def set(self, key: str, value: str) -> None:
        self.num_bytes += len(value)
        self.store.set(key, value)


def compares(rank: int, ports: list[int]) -> None:
    store = Counted(dist.TCPStore("127.0.0.1", ports[0], 3, is_master=rank == 0))
    large = SAME | {"model": 10_000 * "x"}
    exchange = StoreExchange(store, rank, 3, wait_s=30)
    exchange.compare(large)
    assert store.num_bytes < (10 if rank else 20) * 64
    exchange.leave()

    store = dist.TCPStore("127.0.0.1", ports[1], 3, is_master=rank == 0)
    other = SAME | ({"train.seed": "5", "optim.lr": "3.0e-2"} if rank == 2 else {})
    with pytest.raises(LaunchError, match=r"train\.seed is '0' on rank 0, '5' on rank 2") as found:
        StoreExchange(store, rank, 3, wait_s=30).compare(other)
    assert found.value.repeated == (rank == 1)

    store = dist.TCPStore("127.0.0.1", ports[2], 3, is_master=rank == 0)
    other = SAME | ({"its own": "1"} if rank == 1 else {})
    with pytest.raises(LaunchError, match=r"its own is no such value on rank 0, '1' on rank 1"):
        StoreExchange(store, rank, 3, wait_s=30).compare(other)


def join_without_one(rank: int, ports: list[int]) -> None:
    joining._COMPARE_S = 2
    rank_info, timeout = RankInfo(rank, 3, rank, "127.0.0.1", ports[0]), timedelta(seconds=60)
    if rank == 1:  # it meets the others, and dies
        dist.TCPStore("127.0.0.1", ports[0], 3, is_master=False, timeout=timeout)
        return
    with pytest.raises(LaunchError, match=r"ranks \[1\] did not say within 2 s what they were started for"):
        joining.init_distributed(rank_info, Layout(dp=3), "cpu", "train.device", SAME, timeout=timeout)


def one_number_twice(rank: int, ports: list[int]) -> None:
    """Two processes are rank 1: the one that comes last is told, whichever it is."""
    store = dist.TCPStore("127.0.0.1", ports[0], 3, is_master=rank == 0)
    exchange = StoreExchange(store, min(rank, 1), 2, wait_s=30)
    store.wait(["first"], timedelta(seconds=30)) if rank == 2 else None
    late = pytest.raises(LaunchError, match="another process is rank 1 of 2 too") if rank == 2 else nullcontext()
    with late:
        exchange.compare(SAME)
    if rank == 1:
        store.set("first", "")
    store.set(f"end/{rank}", "")
    if rank == 0:  # it serves the others, and ends last
        store.wait(["end/1", "end/2"], timedelta(seconds=30))


def nodes_differ(rank: int, ports: list[int], folder: Path) -> None:
    facts = {"the run folder": f"/runs/{'a' if rank < 2 else 'b'}"}
    with pytest.raises(LaunchError, match="the run folder is '/runs/a' on rank 0, '/runs/b' on rank 2"):
        check(rank, ports[0], "cpu", folder, facts)


def test_the_first_difference_is_named_with_both_values_and_ranks(tmp_path: Path):
    run_ranks(compares, 3, tmp_path, [free_port() for _ in range(3)])


def test_a_rank_that_dies_is_not_waited_for(tmp_path: Path):
    run_ranks(join_without_one, 3, tmp_path, [free_port()])


def test_a_number_that_two_processes_have_is_refused(tmp_path: Path):
    run_ranks(one_number_twice, 3, tmp_path, [free_port()])


def test_the_check_of_nodes_compares_too(tmp_path: Path):
    run_ranks(nodes_differ, 4, tmp_path, [free_port()], tmp_path)
