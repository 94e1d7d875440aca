"""The check of nodes on several ranks, some of which are missing or at fault."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from hopescale.common.rank_info import RankInfo
from hopescale.parallel import bandwidth
from hopescale.parallel.store_exchange import StoreExchange
from hopescale.train import preflight
from tests.support.ranks import run_ranks

FACTS = {"the run folder": "/runs/a"}
NODES = ["n1", "n2", "n3"]


def free_port() -> int:
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def check(rank: int, port: int, device: str, folder: Path, facts: Mapping[str, str] = FACTS) -> preflight.Verdict:
    rank_info = RankInfo(rank, 4, rank % 2, "127.0.0.1", port)
    return preflight.check_nodes(rank_info, f"n{rank // 2 + 1}", ["n1", "n2"], device, [folder], facts)


def checks(rank: int, ports: list[int], folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", ports[0], 4, is_master=rank == 0, wait_for_workers=False)
    exchange = StoreExchange(store, rank, 4, wait_s=3)
    if rank != 2:  # it stays away, and is waited for once
        assert exchange.gather(rank) == {0: 0, 1: 1, 3: 3}
        assert exchange.gather([rank]) == {0: [0], 1: [1], 3: [3]}
        exchange.leave()

    dist.barrier()
    nodes = ["n1", "n1", "n2", "n3"]
    found = bandwidth.measure(nodes, torch.device("cpu"), dist.barrier)
    assert (found.within is not None) == (rank < 2) and found.bandwidth > 0
    assert set(found.pairs) == (set() if rank == 1 else {"n1", "n2", "n3"} - {nodes[rank]})

    dist.destroy_process_group()
    good = check(rank, ports[1], "cpu", folder)
    assert (good.bad, good.shared) == ({}, []) and good.summary.startswith("2 nodes, 4 ranks, all-reduce ")
    bad = check(rank, ports[2], "cuda" if rank == 3 else "cpu", folder)
    assert list(bad.bad) == ["n2"] and bad.bad["n2"].startswith("cuda: ")
    own = folder / f"n{rank // 2}"
    own.write_text("") if rank == 0 else None
    bad = check(rank, ports[3], "cpu", own)
    assert list(bad.bad) == ["n1"] and str(own.parent / "n0") in bad.bad["n1"]
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "again"), 4), rank=rank, world_size=4)


def test_the_check_of_nodes(tmp_path: Path):
    run_ranks(checks, 4, tmp_path, [free_port() for _ in range(4)], tmp_path)
