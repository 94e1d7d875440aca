"""Runs a function on several ranks of one machine; a hang or a failure of any rank fails the test with its stack."""

from __future__ import annotations

import faulthandler
import fcntl
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

LIMIT_S = 120


def run_ranks(
    function: Callable[..., None], world_size: int, folder: Path, *arguments: Any, limit_s: int = LIMIT_S
) -> None:
    """Call `function(rank, *arguments)` on `world_size` processes joined by gloo.

    The processes are forked from a server that has imported the slow modules and has never run a thread of torch.

    Args:
        function: At the top of a module.
        world_size: Number of ranks.
        folder: Scratch folder for the rendezvous file and the ranks' reports.
        arguments: Passed on; must pickle.
        limit_s: Seconds after which the ranks are taken to hang. Of a test whose limits exceed those of pytest, in all,
            a mark raises the latter.
    """
    with (Path(tempfile.gettempdir()) / "hopescale-test-ranks.lock").open("w") as lock:
        # Ranks of two tests at a time would wait for cores rather than for each other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run_ranks(function, world_size, folder, arguments, limit_s)


def _run_ranks(function: Callable[..., None], world_size: int, folder: Path, arguments: tuple, limit_s: int) -> None:
    rendezvous = folder / f"rendezvous-{uuid4().hex}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hopescale.train.worker", "hopescale.engine.pipeline"])
    given = (world_size, folder, rendezvous, arguments, limit_s)
    ranks = [context.Process(target=_run, args=(function, rank, *given), daemon=True) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.02)
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    reports = [
        f"rank {rank}:\n{path.read_text()}" for rank in range(world_size) if (path := _report(folder, rank)).exists()
    ]
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    assert not failed, f"ranks {failed} failed, of which {late} were still running\n" + "\n".join(reports)


def _report(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


def _run(
    function: Callable[..., None],
    rank: int,
    world_size: int,
    folder: Path,
    rendezvous: Path,
    arguments: tuple,
    limit_s: int,
) -> None:
    import torch.distributed as dist

    with _report(folder, rank).open("w") as report:
        faulthandler.dump_traceback_later(limit_s - 10, file=report)
        try:
            store = dist.FileStore(str(rendezvous), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            function(rank, *arguments)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=report)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
