"""What goes wrong while a run proceeds: one message, the right exit code, and nothing lost."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor

from hopescale.checkpoint import save
from hopescale.checkpoint.load import verify
from hopescale.common.errors import DataError
from hopescale.data.loader import Data
from hopescale.engine import Engine
from hopescale.engine.schedule import Loop
from hopescale.observe.health import LossWatch
from hopescale.observe.metrics import MetricsLog
from hopescale.optim.cadence import Accumulator

if TYPE_CHECKING:
    from conftest import Run


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the loss of the micro batches of one step."""
    gradients, loss_of = Engine.gradients, Loop._loss

    def spoiled(engine: Engine, step: int, *args, **options):
        with monkeypatch.context() as patch:
            if step == at:
                patch.setattr(Loop, "_loss", lambda *inner: change(loss_of(*inner)))
            return gradients(engine, step, *args, **options)

    monkeypatch.setattr(Engine, "gradients", spoiled)


def test_a_loss_that_is_not_a_number_stops_the_run(train, run: Run, whole, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        spoil(patch, 6, lambda loss: loss * math.nan)
        done = train("checkpoint.every=5", "train.recovery.skips=0")
    assert done.code == 6
    message, hint = re.fullmatch(r"diverged\n  (.*)\n    hint: (.*)\n", done.err).groups()
    assert message.startswith("step 6: the loss is nan; batch: samples 20 to 23, from source markov, epoch 0, ")
    assert "checkpoints are untouched" in hint
    assert run.steps() == [5] and verify(run.checkpoint(5)).step == 5
    assert [record["step"] for record in run.values()][-1] == 5
    assert train().code == 0
    run.assert_same(whole())


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_batch(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    """In a level that is not due: its sum must not reach a checkpoint."""
    original, calls = Accumulator.take, []

    def spoiled(accumulator: Accumulator, _: Tensor) -> None:
        if accumulator.cadence.period == 4:
            calls.append(accumulator)
            if len(calls) > 9 * 4:  # four weights, two micro batches: the fifth step
                accumulator.parameter.grad *= math.inf
        original(accumulator)

    monkeypatch.setattr(Accumulator, "take", spoiled)
    done = train("checkpoint.every=1", "train.recovery.skips=0")
    assert done.code == 6 and "step 5: the gradient norm is " in done.err and "samples 16 to 19" in done.err
    assert run.steps() == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in run.tensors(4).values())


def test_a_loss_spike_stops_the_run(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.train.setup.LossWatch", partial(LossWatch, window=4))
    spoil(monkeypatch, 9, lambda loss: loss + 32 * 4.0)  # 32 targets a micro batch, nearly
    assert train("train.loss_spike=9.0", "--stop-at", 8).code == 0
    done = train("train.loss_spike=1.5", "train.recovery.skips=0")
    assert done.code == 6
    assert re.search(r"step 9: the loss \d\.\d+ is [45]\.\d\d nats above the mean 3\.\d+ of the last 4 ", done.err)
    assert "train.loss_spike=1.5" in done.err and "samples 32 to 35" in done.err
    assert run.steps() == [4, 8]
    assert train("train.loss_spike=9.0").code == 0


def test_a_batch_that_cannot_be_read_loses_no_step(train, run: Run, whole, monkeypatch: pytest.MonkeyPatch):
    """What was trained before it is saved, and the run goes on from there."""
    original = Data.batch

    def batch(data: Data, indices):
        if 26 in indices:  # of step 7
            raise DataError("shard gone")
        return original(data, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Data, "batch", batch)
        done = train()
    assert (done.code, done.err) == (3, "data error\n  shard gone\n")
    assert run.steps() == [4, 6]
    assert train().code == 0
    run.assert_same(whole())


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_during_a_checkpoint(train, run: Run, whole, monkeypatch: pytest.MonkeyPatch, background: str):
    original = save._DigestingStream.write

    def write(stream, data):
        if "step-00000008" in stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(stream, data)

    override = f"checkpoint.async_save={background}"
    with monkeypatch.context() as patch:
        patch.setattr(save._DigestingStream, "write", write)
        done = train(override)
    assert done.code == 4
    assert re.fullmatch(
        r"checkpoint error\n  cannot write .*/step-00000008: No space left on device \(the state has .*\); last good "
        r"checkpoint: step-00000004\n    hint: free some space .*\n",
        done.err,
    )
    assert run.steps() == [4] and verify(run.checkpoint(4)).step == 4
    assert not list((run.path / "checkpoints").glob(".tmp*"))
    assert train(override).code == 0
    run.assert_same(whole())


def test_a_full_disk_during_the_record(train, run: Run, whole, monkeypatch: pytest.MonkeyPatch):
    """The save that is under way completes; the run continues from it."""
    original = MetricsLog.log

    def log(metrics: MetricsLog, step: int, *args):
        if step == 9:
            metrics._file = io.TextIOWrapper(io.BufferedWriter(io.FileIO("/dev/full", "w")))
        original(metrics, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", log)
        done = train()
    assert done.code == 1
    assert re.fullmatch(
        r"error\n  cannot write .*/metrics.jsonl: No space left on device\n    hint: free some space.*\n", done.err
    )
    assert run.steps() == [4, 8] and verify(run.checkpoint(8)).step == 8
    assert train().code == 0
    run.assert_same(whole())


def test_a_full_disk_at_the_start_keeps_what_the_folder_holds(train, five: Run, monkeypatch: pytest.MonkeyPatch):
    before = five.content()
    original = Path.write_text

    def write_text(path: Path, *args, **options):
        if path.parent == five.path:
            path.open("w").close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    done = train()
    assert done.code == 5 and "No space left on device" in done.err
    after = five.content()
    assert {name: after[name] for name in before} == before


def test_a_failing_save_does_not_hide_why_the_run_ended(train, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, 9, lambda loss: loss * math.nan)

    def write(stream, data):
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save._DigestingStream, "write", write)
    monkeypatch.setattr("hopescale.checkpoint.manager.CheckpointManager.poll", lambda manager: None)
    done = train("checkpoint.every=8", "train.recovery.skips=0")
    assert done.code == 6 and "the loss is nan" in done.err
    assert "cannot write" in done.out and "step-00000008" in done.out


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_start_without_what_its_trackers_need_leaves_no_folder(dry, hopescale, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.observe.trackers.find_spec", lambda name: None)
    done = hopescale("train", "debug", "log.trackers=[wandb]", "--run-dir", tmp_path / "run", *dry)
    assert done.code == 2 and "log.trackers has wandb, but the package wandb is not installed" in done.err
    assert not list(tmp_path.iterdir())
