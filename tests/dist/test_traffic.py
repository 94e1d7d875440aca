"""What is handed to collectives is counted, whichever function of torch it goes through."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from hopescale.config.layout import Layout
from hopescale.parallel.mesh import Mesh
from tests.support.ranks import run_ranks
from tests.support.traffic import Traffic


def check_counts(rank: int) -> None:
    mesh = Mesh.over_all(Layout(tp=2))
    group, parts = mesh.tp_group, list(torch.zeros(2, 3))
    calls = {
        "all_reduce": (lambda: dist.all_reduce(torch.zeros(5), group=group), 20),
        "broadcast": (lambda: dist.broadcast(torch.zeros(5), 0, group=group), 20),
        "reduce": (lambda: dist.reduce(torch.zeros(5), 0, group=group), 20),
        "all_gather": (lambda: dist.all_gather(parts, torch.zeros(3), group=group), 12),
        "all_gather_into_tensor": (
            lambda: dist.all_gather_into_tensor(torch.zeros(6), torch.zeros(3), group=group),
            12,
        ),
        "reduce_scatter": (lambda: dist.reduce_scatter(torch.zeros(3), parts, group=group), 24),
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(torch.zeros(3), torch.zeros(6), group=group), 24),
        "all_to_all_single": (lambda: dist.all_to_all_single(torch.zeros(4), torch.zeros(4), group=group), 16),
        "bfloat16": (lambda: dist.all_reduce(torch.zeros(5, dtype=torch.bfloat16), group=group), 10),
        "async": (lambda: dist.all_reduce(torch.zeros(5), group=group, async_op=True).wait(), 20),
        "control": (lambda: dist.all_reduce(torch.zeros(5), group=mesh.control_group), 0),
        "alone": (lambda: dist.all_reduce(torch.zeros(5), group=mesh.dp_group), 0),
    }
    before = vars(dist.ProcessGroup)["allreduce"]
    with Traffic(mesh) as traffic:
        for name, (call, expected) in calls.items():
            count = traffic.bytes["tp"]
            call()
            assert traffic.bytes["tp"] - count == expected, name
        assert traffic.bytes.total() == traffic.bytes["tp"]
        peer = 1 - rank
        requests = [dist.isend(torch.zeros(7), peer, group=group), dist.irecv(torch.zeros(7), peer, group=group)]
        for request in requests:
            request.wait()
        assert traffic.bytes["pp"] == 28
    assert vars(dist.ProcessGroup)["allreduce"] is before
    dist.all_reduce(torch.zeros(5), group=group)
    assert traffic.bytes["tp"] == sum(expected for _, expected in calls.values())


def test_every_function_is_counted(tmp_path: Path):
    run_ranks(check_counts, 2, tmp_path)
