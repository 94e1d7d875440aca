"""What goes wrong on one rank is found by all: replicas that drift apart, a hang, a failure, a signal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hopescale.common.errors import CheckpointError, ConfigError, DataError, DivergedError, HopescaleError
from hopescale.config.layout import Layout
from hopescale.data.loader import Batch, Data
from hopescale.engine import Engine
from hopescale.parallel.mesh import Mesh
from hopescale.train.folder import Record
from hopescale.train.replicas import differing
from hopescale.train.stop import StopRequest
from tests.support import layouts
from tests.support.layouts import train_run, values
from tests.support.ranks import run_ranks


def drift(rank: int, folder: Path) -> None:
    """One bit of one weight flips on one replica."""
    update = Engine.update

    def flipping(engine: Engine, step: int, *arguments, **options):
        changes = update(engine, step, *arguments, **options)
        if rank == 3 and step == 3:
            weight = engine.optimizer.parameters["blocks.1.cms.levels.slow.up.weight"]
            bits = weight.detach().view(torch.int32)
            bits[2, 3] ^= 1
        return changes

    Engine.update = flipping
    name = r"after step 4 the replicas hold different weights: blocks\.1\.cms\.levels\.slow\.up\.weight\n"
    with pytest.raises(DivergedError, match=name) as caught:
        train_run(folder, 4, "parallel.tp=2")
    assert caught.value.repeated == (rank != 0)


def test_a_replica_that_drifts_is_found_on_all_ranks(tmp_path: Path):
    run_ranks(drift, 4, tmp_path, tmp_path / "run")
    assert list(values(tmp_path / "run")) == [1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000003\n"


def check_differing(rank: int) -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.ones(5).double()}
    assert differing(weights, dist.group.WORLD) == []
    if rank == 1:
        weights["b"][0, 1] += 2**-7
        weights["c"][4] += 1e-15
    assert differing(weights, dist.group.WORLD) == ["b", "c"]


def test_the_smallest_difference_counts(tmp_path: Path):
    run_ranks(check_differing, 2, tmp_path)


def hang(rank: int, folder: Path, first: int) -> None:
    gradients = Engine.gradients

    def waiting(engine: Engine, step: int, *arguments, **options):
        if rank == 1 and step == first:
            time.sleep(15)
        return gradients(engine, step, *arguments, **options)

    Engine.gradients = waiting
    begin = time.monotonic()
    timeouts = {"parallel.timeout_s": 3, "parallel.first_step_timeout_s": 3 if first == 1 else 60}
    with pytest.raises(RuntimeError, match=r"(?i)timed out|closed"):
        train_run(folder, 2, *(f"{key}={seconds}" for key, seconds in timeouts.items()))
    assert rank == 1 or time.monotonic() - begin < 14
    # Groups whose peers have given up cannot be left in good order.
    (folder.parent / f"caught-{rank}").touch()
    raise SystemExit(0)


@pytest.mark.parametrize("first", [1, 2])
def test_a_hang_ends_by_the_timeout(first: int, tmp_path: Path):
    """The first step has a time-out of its own."""
    run_ranks(hang, 2, tmp_path, tmp_path / "run", first)
    assert (tmp_path / "caught-0").exists()
    assert list(values(tmp_path / "run")) == list(range(1, first))


def unreadable(rank: int, folder: Path) -> None:
    batch, reads = Data.batch, []

    def failing(data: Data, indices):
        reads.append(indices)
        if rank == 1 and len(reads) > 4:
            raise DataError("planted")
        return batch(data, indices)

    Data.batch = failing
    with pytest.raises(DataError, match="planted" if rank == 1 else "rank 1 failed; its own message says why"):
        train_run(folder, 2, "data.prefetch=0")


def test_a_batch_that_one_rank_cannot_read_ends_the_run_on_all_and_keeps_what_was_trained(tmp_path: Path):
    run_ranks(unreadable, 2, tmp_path, tmp_path / "run")
    assert list(values(tmp_path / "run")) == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000002\n"


LATE = (
    *("model.num_layers=1", "log.every=100", "checkpoint.every=null"),
    *("train.validation.every=null", "train.replica_check_every=null"),
)
"""Ranks learn of a step when the passes of the next one have been launched."""


def late_news(rank: int, folder: Path) -> None:
    """Rank 1 cannot read the batch of step 5; in another run it is sent a signal in step 3."""
    batch = Data.batch

    def failing(data: Data, indices: Sequence[int]) -> Batch:
        if rank == 1 and max(indices) >= 16:
            raise DataError("planted")
        return batch(data, indices)

    with (
        patch.object(Data, "batch", failing),
        pytest.raises(DataError, match="planted" if rank == 1 else "rank 1 failed; its own message says why"),
    ):
        train_run(folder / "unreadable", 2, *LATE, "data.prefetch=0")
    stop, gradients = StopRequest(), Engine.gradients

    def signalled(engine: Engine, step: int, *arguments, **options):
        stop.reason = "SIGUSR1" if rank == 1 and step == 3 else stop.reason
        return gradients(engine, step, *arguments, **options)

    with patch.object(Engine, "gradients", signalled), patch.object(layouts, "StopRequest", lambda: stop):
        train_run(folder / "signalled", 2, *LATE, "data.prefetch=0")


def test_ranks_that_learn_late_of_a_batch_or_a_signal_stop_together(tmp_path: Path):
    """In time for the batch, as it is read two steps ahead; one step later than those that wait for the signal."""
    run_ranks(late_news, 2, tmp_path, tmp_path)
    for run in ("unreadable", "signalled"):
        assert (tmp_path / run / "checkpoints" / "latest").read_text() == "step-00000004\n"


def full_disk(rank: int, folder: Path) -> None:
    def failing(record: Record, step: int, *_):
        if step == 2:
            raise HopescaleError("planted")

    Record.log = failing
    with pytest.raises(HopescaleError, match="planted" if rank == 0 else "rank 0 failed") as caught:
        train_run(folder, 2)
    assert caught.value.repeated == (rank != 0)


def test_a_record_that_rank_0_cannot_write_ends_the_run_on_all(tmp_path: Path):
    run_ranks(full_disk, 2, tmp_path, tmp_path / "run")


def check_control(rank: int) -> None:
    control = Mesh.over_all(Layout(dp=3)).control
    assert control.is_first == (rank == 0)
    assert control.broadcast_from_rank0(lambda: f"from {rank}") == "from 0"
    assert control.gather(rank) == [0, 1, 2]
    assert control.agree(None, None) is None
    assert control.agree("SIGUSR1" if rank == 2 else None, None) == "SIGUSR1"
    with pytest.raises(CheckpointError, match="mine" if rank == 1 else "rank 1 failed") as caught:
        control.agree("SIGTERM", CheckpointError("mine") if rank == 1 else None)
    assert caught.value.repeated == (rank == 2)

    def same() -> None:
        raise ConfigError("the same everywhere")

    with pytest.raises(ConfigError, match="the same everywhere") as caught:
        control.all_ranks_or_raise(same)
    assert caught.value.repeated == (rank != 0)
    with pytest.raises(ConfigError, match="the same everywhere" if rank == 0 else "rank 0 failed") as caught:
        control.broadcast_from_rank0(same)
    assert caught.value.repeated == (rank != 0)

    def mine() -> None:
        if rank == 2:
            raise DataError("on one alone")

    with pytest.raises(DataError, match="on one alone" if rank == 2 else "rank 2 failed") as caught:
        control.all_ranks_or_raise(mine)
    assert caught.value.repeated == (rank == 1)


def test_ranks_agree(tmp_path: Path):
    run_ranks(check_control, 3, tmp_path)
