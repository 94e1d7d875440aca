"""A run that was stopped, by its user, a signal or a kill, goes on as if it had not been, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from hopescale.checkpoint.manifest import step_of
from hopescale.data.loader import Data
from hopescale.engine import Engine
from hopescale.ops.draws import RandomBits
from hopescale.train.state import TrainState
from tests.integration.conftest import Run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_are_five_and_five(train, run: Run, whole, precision: str):
    override = f"train.precision={precision}"
    first = train(override, "data.prefetch=2", "--stop-at", 5)
    assert first.code == 0 and first.out.endswith("stopped at step 5 of 10, as --stop-at asked\n")
    waiting = run.tensors(5)
    for level in ("mid", "slow"):
        gathered = waiting[f"optimizer.blocks.0.cms.levels.{level}.up.weight.accumulator.0"]
        assert gathered.dtype == torch.float32 and gathered.abs().sum() > 0
    dtypes = {tensor.dtype for name, tensor in waiting.items() if name.startswith("model.")}
    assert dtypes == {torch.float32} | ({torch.bfloat16} if precision == "bf16" else set())
    second = train(override, "data.prefetch=0", "--resume", "must")
    assert second.code == 0
    assert f"resumed from {run.checkpoint(5)} at step 5" in second.out
    assert "data.prefetch: 2 -> 0" in second.out
    run.assert_same(whole(precision))


def test_a_run_that_continues_draws_no_weights(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    drawn, at = [], RandomBits.at
    monkeypatch.setattr(RandomBits, "at", lambda bits, runs: drawn.append(bits) or at(bits, runs))
    assert train("--stop-at", 2).code == 0
    assert drawn
    drawn.clear()
    assert train("--stop-at", 3).code == 0
    assert not drawn


def test_every_sample_is_read_once_and_in_order(train, monkeypatch: pytest.MonkeyPatch):
    original, read = Data.batch, []

    def batch(data: Data, indices):
        read.extend(indices)
        return original(data, indices)

    monkeypatch.setattr(Data, "batch", batch)
    assert train("--stop-at", 5).code == 0
    assert read == list(range(20))
    assert train().code == 0
    assert read == list(range(40))


def test_sources_in_another_order_are_refused_where_samples_would_move(train, run: Run):
    """Of three equal sources the first has a place more than the others in the pattern of 4,096."""

    def sources(names: str) -> list[str]:
        return ["data.sources.markov=null", *(f"data.sources.{name}.synthetic.task=markov" for name in names)]

    assert train(*sources("abc"), "--stop-at", 1).code == 0
    other = train(*sources("cab"), "--stop-at", 2)
    assert other.code == 4, other.out
    assert f"the order of data.sources is c, a, b, but a, b, c in {run.checkpoint(1)}: samples would" in other.err
    assert train(*sources("acb"), "--stop-at", 2).code == 0


def test_any_number_of_stops_gives_the_same_run(train, run: Run, whole):
    for stop in (1, 2, 7, 10):
        assert train("--stop-at", stop).code == 0
    run.assert_same(whole())


def test_a_finished_run_is_left_alone(train, run: Run, whole):
    shutil.copytree(whole().path, run.path)
    before = run.content("checkpoints"), run.values()
    done = train()
    assert done.code == 0 and done.out.endswith("done: step 10 of 10\n")
    assert (run.content("checkpoints"), run.values()) == before


def test_an_earlier_checkpoint_starts_another_course(train, run: Run, whole):
    """Continued by path from step 4 the run drops what it recorded later, and ends the same."""
    shutil.copytree(whole().path, run.path)
    assert train("--resume", run.checkpoint(4), "--stop-at", 6).code == 0
    assert [record["step"] for record in run.values()] == list(range(7))
    assert run.latest().name == "step-00000006"
    assert train().code == 0
    run.assert_same(whole())


def test_a_run_can_begin_with_the_checkpoint_of_another(train, run: Run, whole):
    assert train("--resume", whole().checkpoint(8)).code == 0
    assert run.steps() == [10] and whole().steps() == [4, 8, 10]
    found, expected = run.tensors(10), whole().tensors(10)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_branch_equals_a_run_of_its_own(train, hopescale, run: Run, tmp_path, tiny):
    """Levels of periods 2 and 4 have gathered gradients at the step where it branches off."""
    wsd = (*tiny, "optim.schedule.name=wsd", "optim.schedule.decay_fraction=0.3")
    trunk, branch = Run(tmp_path / "trunk"), Run(tmp_path / "branch")
    kept = ("train.steps=16", "checkpoint.keep_at=[7]", "checkpoint.keep_last=1", "--stop-at", 9)
    assert hopescale("train", "debug", *wsd, *kept, "--run-dir", trunk.path).code == 0
    assert trunk.steps() == [7, 9]
    begin = ("--branch-from", trunk.checkpoint(7), "--run-dir", branch.path)
    assert hopescale("train", "debug", *wsd, *begin, "--stop-at", 9).code == 0
    shutil.rmtree(trunk.path)
    assert hopescale("train", "debug", *wsd, *begin).code == 0, "the second start goes on from its own checkpoint"
    assert train(*wsd[-2:]).code == 0
    own = [values for values in run.values() if values["step"] > 7]
    assert branch.values() == own and len(own) == 3
    found, expected = branch.tensors(10), run.tensors(10)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    refused = hopescale("train", "debug", *wsd, *begin, "--init", run.path)
    assert refused.code == 2 and "--branch-from has no effect with --init" in refused.err


def test_tensorboard_hides_what_was_given_up(train, run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("log.trackers=[tensorboard]", "--stop-at", 6).code == 0
    assert train("log.trackers=[tensorboard]", "--resume", run.checkpoint(4)).code == 0
    view = EventAccumulator(str(run.path / "tb")).Reload()
    assert [event.step for event in view.Scalars("loss")] == list(range(1, 11))


def test_a_run_moves_between_kinds_of_device(train, run: Run, five: Run, whole, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint of a CUDA run holds one generator more."""
    original = TrainState.tensors

    def as_on_cuda(state: TrainState) -> dict:
        tensors = original(state)
        return tensors | {"generators": tensors["generators"] | {"cuda": torch.arange(16, dtype=torch.uint8)}}

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "tensors", as_on_cuda)
        assert train("--stop-at", 7).code == 0
    assert "generators.cuda" in five.manifest(7).tensors
    assert train().code == 0
    five.assert_same(whole())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step(
    train, run: Run, whole, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    original, handler = Engine.update, signal.getsignal(number)

    def update(engine: Engine, step: int, *args, **options):
        if step == 5:
            os.kill(os.getpid(), number)
        return original(engine, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        done = train()
    assert done.code == 75
    assert f"stopped\n  {number.name} at step 5 of 10; the state is saved\n    hint: the same command con" in done.err
    assert run.steps() == [4, 5]
    assert signal.getsignal(number) is handler
    assert train().code == 0
    run.assert_same(whole())


def test_a_terminal_that_closes_does_not_stop_what_nohup_started(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    original = Engine.update

    def update(engine: Engine, step: int, *args, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        return original(engine, step, *args, **options)

    monkeypatch.setattr(Engine, "update", update)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train("--stop-at", 3).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.steps() == [3]


def test_a_signal_before_the_first_step_promises_nothing(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    original = Engine.evaluate

    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    done = train()
    assert done.code == 75 and "SIGTERM at step 0 of 10; there was nothing to save yet" in done.err
    assert run.steps() == []


def test_after_a_resume_by_path_the_same_command_would_start_over(
    train, run: Run, whole, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hopescale.train.trainer.Trainer.run", lambda *args: "SIGTERM")
    done = train("--resume", whole().checkpoint(4))
    assert done.code == 75 and "hint: the same command with --resume auto continues the run" in done.err


CHILD = """
import sys, time
from hopescale.checkpoint import save
from hopescale.cli.app import main
from hopescale.engine import Engine
from hopescale.ops.draws import RandomBits

update, write = Engine.update, save._DigestingStream.write

def slow_update(engine, step, *args, **options):
    time.sleep(0.05)
    return update(engine, step, *args, **options)

def stuck_write(stream, data):
    written = write(stream, data[: len(data) // 2])
    if "step-00000006" in stream.name:
        print("saving", flush=True)
        time.sleep(600)
    return written + write(stream, data[len(data) // 2 :])

Engine.update = slow_update
if sys.argv[1] == "stuck":
    save._DigestingStream.write = stuck_write
main(sys.argv[2:])
"""


@pytest.fixture
def start(tiny: tuple[str, ...], run: Run) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `hopescale train` in a process of its own, slow enough to be met in the middle."""
    children = []

    def begin(kind: str, *args: str) -> subprocess.Popen:
        command = [sys.executable, "-c", CHILD, kind, "train", "debug", *tiny, *args, "--run-dir", str(run.path)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def read_until(child: subprocess.Popen, start_of_line: str) -> None:
    for line in child.stdout:
        if line.startswith(start_of_line):
            return
    raise AssertionError(child.stderr.read())


def test_sigterm_from_outside_saves_and_exits_75(train, start, run: Run, whole):
    child = start("slow")
    read_until(child, "step 3/10  loss")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75 and "SIGTERM at step" in err and "Traceback" not in err
    assert 3 <= step_of(run.latest()) < 10
    assert train("--resume", "must").code == 0
    run.assert_same(whole())


def test_a_kill_in_the_middle_of_a_save_loses_only_that_save(train, start, run: Run, whole):
    child = start("stuck", "checkpoint.every=2")
    read_until(child, "saving")
    held = train()
    assert held.code == 5 and f"run folder {run.path} is in use by another process" in held.err
    child.kill()
    child.communicate(timeout=60)
    half = run.path / "checkpoints" / ".tmp-step-00000006"
    assert half.is_dir() and run.steps() == [2, 4]
    done = train("checkpoint.every=2")
    assert done.code == 0 and "step-00000004 at step 4" in done.out
    assert not half.exists() and run.steps() == [2, 4, 6, 8, 10]
    run.assert_same(whole())


def test_a_run_goes_on_without_its_console(start, run: Run):
    child = start("slow")
    read_until(child, "step 1/10  loss")
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(100) == 0 and err == "", err
    assert (run.path / "outcome").read_text() == "done at step 10 of 10\n" and run.steps()[-1] == 10
    reason, *lines = (run.path / "console.log").read_text().splitlines()
    assert reason == "the console was lost: Broken pipe; what could not be shown follows"
    assert lines[-1] == "done: step 10 of 10"
