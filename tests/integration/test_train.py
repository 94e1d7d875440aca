"""`hopescale train` as a user runs it: what it leaves, how it stops, how it goes on, what it refuses."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.checkpoint import save
from hopescale.checkpoint.load import load_into, verify
from hopescale.checkpoint.manager import latest_checkpoint
from hopescale.checkpoint.manifest import read_manifest
from hopescale.common.errors import DataError
from hopescale.config.load import load_recipe, load_resolved
from hopescale.data.loader import Data
from hopescale.engine import Engine
from hopescale.observe.health import LossWatch
from hopescale.observe.metrics import MetricsLog, read_metrics
from hopescale.train.folder import RunFolder
from hopescale.train.stop import StopRequest

TINY = [
    "model.d_model=16",
    "model.num_layers=1",
    "model.vocab_size=32",
    "model.self_modifying.chunk_size=8",
    "model.cms.levels.fast.d_ff=16",
    "model.cms.levels.mid.d_ff=16",
    "model.cms.levels.slow.d_ff=16",
    "data.sources.markov.synthetic.num_symbols=12",
    "data.seed=3",
    "train.steps=10",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=64",
    "train.validation.every=4",
    "train.validation.tokens=64",
    "optim.schedule.warmup_steps=2",
    "checkpoint.every=4",
    "checkpoint.keep_last=9",
    "log.every=1",
    "log.tensorboard=false",
]
"""The recipe `debug` made smaller: levels of periods 1, 2 and 4, two micro batches a step."""

Train = Callable[..., "Outcome"]  # noqa: F821 - tests/integration/conftest.py
MEASURED = ("time", "tps", "mfu", "time/step_s", "time/data_s", "device_memory/peak_gib")
"""What two equal runs need not agree on."""


@pytest.fixture
def train(hopescale, tmp_path: Path) -> Train:
    """Run `hopescale train debug` with the tiny overrides, later ones winning, in `tmp_path/run`."""

    def run(*args: object, folder: Path = tmp_path / "run"):
        return hopescale("train", "debug", *TINY, *args, "--run-dir", folder)

    return run


@pytest.fixture(scope="session")
def whole(hopescale, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a run of ten steps that nothing interrupted, by precision."""
    done: dict[str, Path] = {}

    def of(precision: str = "fp32") -> Path:
        if precision not in done:
            folder = done[precision] = tmp_path_factory.mktemp("whole") / precision
            override = f"train.precision={precision}"
            assert hopescale("train", "debug", *TINY, override, "--run-dir", folder).code == 0
        return done[precision]

    return of


@pytest.fixture
def five(whole, train: Train, tmp_path: Path) -> Path:
    """A run that stopped at step 5: in mid-period of both slow levels."""
    assert train("--stop-at", 5).code == 0
    return tmp_path / "run"


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    entries = read_manifest(checkpoint).tensors
    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    load_into(tensors, checkpoint)
    return tensors


def values_of(run: Path) -> list[dict[str, float]]:
    """Return the record of a run without what depends on the clock."""
    records = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]


def assert_same_course(run: Path, expected: Path) -> None:
    """Every recorded value of two runs and every tensor and number of their last checkpoints, bit for bit."""
    assert values_of(run) == values_of(expected)
    last, wanted = latest_checkpoint(run / "checkpoints"), latest_checkpoint(expected / "checkpoints")
    assert last.name == wanted.name
    assert read_manifest(last).progress == read_manifest(wanted).progress
    found, tensors = tensors_of(last), tensors_of(wanted)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same = torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert same, name


def checkpoints_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# what a run leaves


def test_the_debug_recipe_leaves_a_run_folder(hopescale, tmp_path: Path):
    """The recipe as it is, but short."""
    run = tmp_path / "run"
    args = ("train.steps=6", "optim.schedule.warmup_steps=2", "log.every=3", "checkpoint.every=4")
    done = hopescale("train", "debug", *args, "--run-dir", run)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.fullmatch(rf"debug: [\d,]+ parameters on (cpu|cuda), run folder {re.escape(str(run))}", lines[0])
    assert re.fullmatch(r"step 0/6  val/markov  loss 4\.\d{4}", lines[1])
    step = r"loss \d\.\d{4}  grad \d\.\d\d  lr \d\.\de-\d  mem [\d.]+[MG]iB  tps [\d,]+(  mfu [\d.]+%)?  eta \w+"
    assert re.fullmatch(rf"step 3/6  {step}  due fast", lines[2])
    assert re.fullmatch(rf"step 6/6  {step}  due fast,mid", lines[3])
    assert lines[4].startswith("step 6/6  val/markov  loss ") and lines[5:] == ["done: step 6 of 6"]
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "env.txt",
        "groups.txt",
        "metrics.jsonl",
        "origins.json",
        "overrides.txt",
        "plan.json",
        "tb",
    }
    assert (run / "overrides.txt").read_text().splitlines() == list(args)
    assert json.loads((run / "origins.json").read_text())["train.steps"] == "command line"
    assert json.loads((run / "plan.json").read_text())["grad_accumulation"] == 2
    assert "no_decay" in (run / "groups.txt").read_text() and "torch 2." in (run / "env.txt").read_text()
    assert load_resolved(run / "config.yaml") == load_recipe("debug", args).config
    assert len(list((run / "tb").glob("events*"))) == 1


def test_the_record_of_a_run(whole):
    records = read_metrics(whole() / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(11))
    assert [record["tokens_seen"] for record in records] == [64 * step for step in range(11)]
    assert [record["step"] for record in records if "val/markov/loss" in record] == [0, 4, 8, 10]
    assert abs(records[0]["val/markov/loss"] - math.log(32)) < 0.1 and "loss" not in records[0]
    for record in records[1:]:
        step = record["step"]
        due = {level for level, period in (("fast", 1), ("mid", 2), ("slow", 4)) if step % period == 0}
        assert {name.split("/")[1] for name in record if name.startswith("level/")} == due
        assert record["level/fast/updates"] == step and record["level/fast/update_rms"] > 0
        assert record["memory/0/eta_mean"] == pytest.approx(0.1, abs=0.01)
        assert record["tps"] > 0 and record["time/step_s"] >= record["time/data_s"]
    assert records[8]["level/slow/updates"] == 2 and records[8]["level/mid/updates"] == 4
    assert records[2]["lr/decay"] == pytest.approx(3e-3) and records[10]["lr/decay"] == pytest.approx(3e-4)


def test_validation_can_be_left_out(train: Train, tmp_path: Path):
    done = train("train.validation.every=null", "train.steps=4")
    assert done.code == 0 and "val/" not in done.out
    assert not any(name.startswith("val/") for record in values_of(tmp_path / "run") for name in record)


def test_old_checkpoints_are_removed_but_those_to_be_kept(train: Train, tmp_path: Path):
    assert train("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4").code == 0
    assert checkpoints_of(tmp_path / "run") == [4, 8, 9, 10]


def test_without_a_period_the_end_alone_is_saved(train: Train, tmp_path: Path):
    assert train("checkpoint.every=null", "train.steps=4").code == 0
    assert checkpoints_of(tmp_path / "run") == [4]


def test_saving_in_the_background_changes_nothing(train: Train, whole, tmp_path: Path):
    assert train("checkpoint.async_save=false", "checkpoint.every=3").code == 0
    assert_same_course(tmp_path / "run", whole())


# continuing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_are_five_and_five(train: Train, whole, tmp_path: Path, precision: str):
    override, run = f"train.precision={precision}", tmp_path / "run"
    first = train(override, "data.prefetch=2", "--stop-at", 5)
    assert first.code == 0 and first.out.endswith("stopped at step 5 of 10, as --stop-at asked\n")
    waiting = tensors_of(run / "checkpoints" / "step-00000005")
    for level in ("mid", "slow"):
        gathered = waiting[f"optimizer.blocks.0.cms.levels.{level}.up.weight.accumulator"]
        assert gathered.dtype == torch.float32 and gathered.abs().sum() > 0
    dtypes = {tensor.dtype for name, tensor in waiting.items() if name.startswith("model.")}
    assert dtypes == {torch.float32} | ({torch.bfloat16} if precision == "bf16" else set())
    second = train(override, "data.prefetch=0", "--resume", "must")
    assert second.code == 0
    assert f"resumed from {run}/checkpoints/step-00000005 at step 5" in second.out
    assert "data.prefetch: 2 -> 0" in second.out
    assert_same_course(run, whole(precision))


def test_any_number_of_stops_gives_the_same_run(train: Train, whole, tmp_path: Path):
    for stop in (1, 2, 7, 10):
        assert train("--stop-at", stop).code == 0
    assert_same_course(tmp_path / "run", whole())


def test_a_finished_run_is_left_alone(train: Train, whole, tmp_path: Path):
    run = shutil.copytree(whole(), tmp_path / "run")
    before = content_of(run / "checkpoints"), values_of(run)
    done = train()
    assert done.code == 0 and done.out.endswith("done: step 10 of 10\n")
    assert (content_of(run / "checkpoints"), values_of(run)) == before


def test_an_earlier_checkpoint_starts_another_course(train: Train, whole, tmp_path: Path):
    """Continued by path from step 4 the run drops what it recorded later, and ends the same."""
    run = shutil.copytree(whole(), tmp_path / "run")
    assert train("--resume", run / "checkpoints" / "step-00000004", "--stop-at", 6).code == 0
    assert [record["step"] for record in values_of(run)] == list(range(7))
    assert latest_checkpoint(run / "checkpoints").name == "step-00000006"
    assert train().code == 0
    assert_same_course(run, whole())


def test_a_run_can_begin_with_the_checkpoint_of_another(train: Train, whole, tmp_path: Path):
    run = tmp_path / "run"
    assert train("--resume", whole() / "checkpoints" / "step-00000008").code == 0
    assert checkpoints_of(run) == [10] and checkpoints_of(whole()) == [4, 8, 10]
    found, expected = (tensors_of(folder / "checkpoints" / "step-00000010") for folder in (run, whole()))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_tensorboard_hides_what_was_given_up(train: Train, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("log.tensorboard=true", "--stop-at", 6).code == 0
    assert train("log.tensorboard=true", "--resume", tmp_path / "run/checkpoints/step-00000004").code == 0
    view = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    assert [event.step for event in view.Scalars("loss")] == list(range(1, 11))


def test_a_run_moves_between_kinds_of_device(train: Train, five: Path, whole, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint of a CUDA run holds one generator more."""
    from hopescale.train.state import TrainState

    original = TrainState.tensors

    def as_on_cuda(state: TrainState) -> dict:
        tensors = original(state)
        return tensors | {"generators": tensors["generators"] | {"cuda": torch.arange(16, dtype=torch.uint8)}}

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "tensors", as_on_cuda)
        assert train("--stop-at", 7).code == 0
    assert "generators.cuda" in read_manifest(five / "checkpoints" / "step-00000007").tensors
    assert train().code == 0
    assert_same_course(five, whole())


# being stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(train, whole, tmp_path, monkeypatch, number: signal.Signals):
    original = Engine.update

    def update(engine: Engine, step: int, *args, **options):
        if step == 5:
            os.kill(os.getpid(), number)
        return original(engine, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", update)
        done = train()
    assert done.code == 75
    assert f"stopped\n  {number.name} at step 5 of 10; the state is saved\n    hint: the same command con" in done.err
    assert checkpoints_of(tmp_path / "run") == [4, 5]
    assert signal.getsignal(number) is not StopRequest._note
    assert train().code == 0
    assert_same_course(tmp_path / "run", whole())


def test_a_signal_before_the_first_step_promises_nothing(train, tmp_path, monkeypatch):
    original = Engine.evaluate

    def evaluate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(Engine, "evaluate", evaluate)
    done = train()
    assert done.code == 75 and "SIGTERM at step 0 of 10; there was nothing to save yet" in done.err
    assert checkpoints_of(tmp_path / "run") == []


def test_after_a_resume_by_path_the_same_command_would_start_over(train, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("hopescale.train.trainer.Trainer.run", lambda *args: "SIGTERM")
    done = train("--resume", whole() / "checkpoints" / "step-00000004")
    assert done.code == 75 and "hint: the same command with --resume auto continues the run" in done.err


CHILD = """
import sys, time
from hopescale.checkpoint import save
from hopescale.cli.app import main
from hopescale.engine import Engine

update, write, steps = Engine.update, save._DigestingStream.write, []

def slow_update(engine, step, *args, **options):
    time.sleep(0.05)
    steps.append(step)
    return update(engine, step, *args, **options)

def stuck_write(stream, data):
    written = write(stream, data[: len(data) // 2])
    if steps[-1] >= 6 or "step-00000006" in stream.name:
        print("saving", flush=True)
        time.sleep(600)
    return written + write(stream, data[len(data) // 2 :])

Engine.update = slow_update
if sys.argv[1] == "stuck":
    save._DigestingStream.write = stuck_write
main(sys.argv[2:])
"""


def start(kind: str, run: Path, *args: object) -> subprocess.Popen:
    """Start `hopescale train` in a process of its own, slow enough to be met in the middle."""
    command = [sys.executable, "-c", CHILD, kind, "train", "debug", *TINY, *map(str, args), "--run-dir", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(child: subprocess.Popen, start_of_line: str) -> None:
    for line in child.stdout:
        if line.startswith(start_of_line):
            return
    raise AssertionError(child.stderr.read())


def test_sigterm_from_outside_saves_and_exits_75(train: Train, whole, tmp_path: Path):
    run = tmp_path / "run"
    child = start("slow", run)
    read_until(child, "step 3/10  loss")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75 and "SIGTERM at step" in err and "Traceback" not in err
    assert 3 <= read_manifest(latest_checkpoint(run / "checkpoints")).step < 10
    assert train("--resume", "must").code == 0
    assert_same_course(run, whole())


def test_a_kill_in_the_middle_of_a_save_loses_only_that_save(train: Train, whole, tmp_path: Path):
    run = tmp_path / "run"
    child = start("stuck", run, "checkpoint.every=2")
    read_until(child, "saving")
    held = train()
    assert held.code == 5 and f"run folder {run} is in use by another process" in held.err
    child.kill()
    child.communicate(timeout=60)
    half = run / "checkpoints" / ".tmp-step-00000006"
    assert half.is_dir() and checkpoints_of(run) == [2, 4]
    done = train("checkpoint.every=2")
    assert done.code == 0 and "step-00000004 at step 4" in done.out
    assert not half.exists() and checkpoints_of(run) == [2, 4, 6, 8, 10]
    assert_same_course(run, whole())


# diverging


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the loss of the micro batches of one step."""
    gradients, loss_sum = Engine.gradients, Engine._loss_sum

    def spoiled(engine: Engine, step: int, *args, **options):
        with monkeypatch.context() as patch:
            if step == at:
                patch.setattr(Engine, "_loss_sum", lambda *inner: change(loss_sum(*inner)))
            return gradients(engine, step, *args, **options)

    monkeypatch.setattr(Engine, "gradients", spoiled)


def test_a_loss_that_is_not_a_number_stops_the_run(train: Train, whole, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, 6, lambda loss: loss * math.nan)
        done = train("checkpoint.every=5")
    assert done.code == 6
    message, hint = re.fullmatch(r"diverged\n  (.*)\n    hint: (.*)\n", done.err).groups()
    assert message.startswith("step 6: the loss is nan; batch: samples 20 to 23, from source markov, epoch 0, ")
    assert "last good checkpoint is untouched" in hint
    assert checkpoints_of(run) == [5] and verify(run / "checkpoints" / "step-00000005").step == 5
    assert [record["step"] for record in values_of(run)][-1] == 5
    assert train().code == 0
    assert_same_course(run, whole())


def test_a_gradient_that_is_not_finite_stops_the_run_at_its_batch(train: Train, tmp_path: Path, monkeypatch):
    """In a level that is not due: its sum must not reach a checkpoint."""
    take = "hopescale.optim.cadence.Accumulator.take"
    from hopescale.optim.cadence import Accumulator

    original, calls = Accumulator.take, []

    def spoiled(accumulator: Accumulator) -> None:
        if accumulator.cadence.period == 4:
            calls.append(accumulator)
            if len(calls) > 9 * 4:  # four weights, two micro batches: the fifth step
                accumulator.parameter.grad *= math.inf
        original(accumulator)

    monkeypatch.setattr(take, spoiled)
    done = train("checkpoint.every=1")
    assert done.code == 6 and "step 5: the gradient norm is " in done.err and "samples 16 to 19" in done.err
    assert checkpoints_of(tmp_path / "run") == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / "run/checkpoints/step-00000004").values())


def test_a_loss_spike_stops_the_run(train: Train, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.train.setup.LossWatch", partial(LossWatch, window=4))
    spoil(monkeypatch, 9, lambda loss: loss + 32 * 4.0)  # 32 targets a micro batch, nearly
    assert train("train.loss_spike=9.0", "--stop-at", 8).code == 0
    done = train("train.loss_spike=1.5")
    assert done.code == 6
    assert re.search(r"step 9: the loss \d\.\d+ is [45]\.\d\d nats above the mean 3\.\d+ of the last 4 ", done.err)
    assert "train.loss_spike=1.5" in done.err and "samples 32 to 35" in done.err
    assert checkpoints_of(tmp_path / "run") == [4, 8]
    assert train("train.loss_spike=9.0").code == 0


# refusing


def test_two_processes_do_not_share_a_run_folder(train: Train, five: Path):
    before = content_of(five)
    with RunFolder(five):
        done = train()
    assert done.code == 5 and f"run folder {five} is in use by another process" in done.err
    assert content_of(five) == before
    assert train("--stop-at", 6).code == 0


def test_resume_never_and_must(train: Train, tmp_path: Path):
    missing = train("--resume", "must")
    assert missing.code == 4 and "--resume must, but " in missing.err and "holds no checkpoint" in missing.err
    assert train("--resume", "never", "--stop-at", 2).code == 0
    again = train("--resume", "never", "--stop-at", 4)
    assert again.code == 4 and "already holds step-00000002" in again.err
    assert checkpoints_of(tmp_path / "run") == [2]


@pytest.mark.parametrize("name", ["nowhere", "run/checkpoints/step-00000003"])
def test_resume_from_a_checkpoint_that_is_not_there(train: Train, five: Path, tmp_path: Path, name: str):
    done = train("--resume", tmp_path / name)
    assert done.code == 4 and str(tmp_path / name) in done.err and "hint: " in done.err


def test_changes_of_identity_are_refused_all_at_once(train: Train, five: Path):
    before = content_of(five / "checkpoints"), (five / "config.yaml").read_bytes(), values_of(five)
    changes = ("model.cms.levels.slow.update_every_steps=5", "data.seed=4", "train.seed=1", "train.seq_len=32")
    done = train(*changes, "optim.lr=1e-3")
    assert done.code == 2 and done.err.startswith("config error (4 problems)")
    for change in changes:
        key, _, value = change.partition("=")
        assert re.search(rf"{re.escape(key)}: is \d+ in the run folder, now {value}: a run cannot change it", done.err)
    assert "optim.lr" not in done.err
    assert (content_of(five / "checkpoints"), (five / "config.yaml").read_bytes(), values_of(five)) == before


def test_other_changes_are_shown_and_taken(train: Train, five: Path):
    done = train("optim.lr=1e-3", "train.steps=12", "log.every=2")
    assert done.code == 0
    shown = done.out[done.out.index("changed since the checkpoint:\n") : done.out.index("resumed from")].splitlines()[
        1:
    ]
    assert sorted(shown) == ["log.every: 1 -> 2", "optim.lr: 0.003 -> 0.001", "train.steps: 10 -> 12"]
    assert latest_checkpoint(five / "checkpoints").name == "step-00000012"
    assert "lr: 0.001" in (five / "config.yaml").read_text()


def test_a_change_of_precision_is_refused(train: Train, five: Path):
    done = train("train.precision=bf16")
    assert done.code == 4 and "does not fit this run" in done.err and "train.precision" in done.err


def test_a_run_cannot_end_before_it_stands(train: Train, five: Path):
    done = train("--stop-at", 3)
    assert done.code == 2 and "--stop-at is 3, but " in done.err and "is already at step 5" in done.err
    done = train("train.steps=4")
    assert done.code == 2 and "is at step 5, beyond train.steps=4" in done.err
    assert train("--stop-at", 5).code == 0
    assert checkpoints_of(five) == [4, 5]


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_stop_outside_of_the_run_is_refused(train: Train, tmp_path: Path, step: int):
    done = train("--stop-at", step)
    assert done.code == 2 and f"--stop-at is {step}, but the run has steps 1 to 10" in done.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_named(train: Train, five: Path):
    file = five / "checkpoints" / "step-00000005" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = train()
    assert done.code == 4 and "step-00000005 is damaged: __0_0.distcp" in done.err
    assert f"--resume {five}/checkpoints/step-00000004" in done.err
    assert train("--resume", five / "checkpoints" / "step-00000004", "--stop-at", 6).code == 0


def test_a_run_longer_than_its_data_is_refused_before_it_starts(train: Train, tmp_path: Path):
    done = train("data.sources.markov.synthetic.num_samples=39")
    assert done.code == 2 and "the run reads 40 sequences of it" in done.err and "data.max_epochs=2" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_parameter_in_two_groups_is_refused(train: Train):
    done = train("optim.groups.embed.match=['*embedding*','blocks.0.norm.*']")
    assert done.code == 2 and "parameter blocks.0.norm.weight matches no_decay and embed" in done.err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_folder_that_cannot_be_made(train: Train, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("precious")
    done = train(folder=tmp_path / place)
    assert done.code == 5 and f"cannot write the run folder {tmp_path / place}" in done.err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_dry_run_shows_the_plan_and_touches_nothing(tmp_path: Path):
    code = "import sys; from hopescale.cli.app import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "train", "debug", *TINY, "--dry-run", "--run-dir", "there"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    assert lines["run_dir"] == "there" and lines["grad_accumulation"] == "2" and lines["total_tokens"] == "640"
    assert int(lines["parameters/total"].replace(",", "")) > 0
    assert not list(tmp_path.iterdir())


# data of one's own


@pytest.fixture
def on_text(train: Train, text_data: Path, tmp_path: Path) -> Train:
    """Train on a copy of the prepared text."""
    shutil.copytree(text_data / "data", tmp_path / "data")
    source = (f"data.sources.text.path={tmp_path / 'data'}", "data.sources.markov=null", "model.vocab_size=300")
    return partial(train, *source)


def test_a_run_on_text_measures_bits_per_byte_and_keeps_the_tokenizer(on_text: Train, text_data: Path, tmp_path: Path):
    assert on_text("train.steps=4").code == 0
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    ratio = last["val/text/loss"] / math.log(2) / last["val/text/bits_per_byte"]
    assert 1 < ratio < 8
    tokenizer = (text_data / "tok" / "tokenizer.model").read_bytes()
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "tokenizer.model").read_bytes() == tokenizer


def test_other_data_under_the_same_path_is_refused(on_text: Train, hopescale, text_data: Path, tmp_path: Path):
    assert on_text("--stop-at", 5).code == 0
    before = content_of(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "data")
    made = ("--out", tmp_path / "data", "--tokenizer", text_data / "tok", "--validation", 0.1, "--seed", 1)
    assert hopescale("data", "prepare", text_data / "text", *made).code == 0
    done = on_text()
    assert done.code == 4 and "the data is not what" in done.err and "step-00000005 was trained on" in done.err
    assert content_of(tmp_path / "run" / "checkpoints") == before


def test_missing_data_is_one_message(on_text: Train, tmp_path: Path):
    shutil.rmtree(tmp_path / "data")
    done = on_text()
    assert done.code == 3 and f"{tmp_path / 'data'}" in done.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_wrong_vocabulary_is_one_message(on_text: Train):
    done = on_text("model.vocab_size=301")
    assert done.code == 2 and "model.vocab_size: is 301, but the tokenizer of" in done.err


def test_a_batch_that_cannot_be_read_loses_no_step(train: Train, whole, tmp_path: Path, monkeypatch):
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
    assert checkpoints_of(tmp_path / "run") == [4, 6]
    assert train().code == 0
    assert_same_course(tmp_path / "run", whole())


# a full disk


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_during_a_checkpoint(train: Train, whole, tmp_path: Path, monkeypatch, background: str):
    run, original = tmp_path / "run", save._DigestingStream.write

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
    assert checkpoints_of(run) == [4] and verify(run / "checkpoints" / "step-00000004").step == 4
    assert not list((run / "checkpoints").glob(".tmp*"))
    assert train(override).code == 0
    assert_same_course(run, whole())


def test_a_full_disk_during_the_record(train: Train, whole, tmp_path: Path, monkeypatch):
    """The save that is under way completes; the run continues from it."""
    run, original = tmp_path / "run", MetricsLog.log

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
    assert checkpoints_of(run) == [4, 8] and verify(run / "checkpoints" / "step-00000008").step == 8
    assert train().code == 0
    assert_same_course(run, whole())


def test_a_full_disk_at_the_start_keeps_what_the_folder_holds(train: Train, five: Path, monkeypatch):
    before = content_of(five)
    original = Path.write_text

    def write_text(path: Path, *args, **options):
        if path.parent == five:
            path.open("w").close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    done = train()
    assert done.code == 5 and "No space left on device" in done.err
    after = content_of(five)
    assert {name: after[name] for name in before} == before


def test_a_failing_save_does_not_hide_why_the_run_ended(train: Train, tmp_path: Path, monkeypatch):
    spoil(monkeypatch, 9, lambda loss: loss * math.nan)

    def write(stream, data):
        time.sleep(0.2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(save._DigestingStream, "write", write)
    monkeypatch.setattr("hopescale.checkpoint.manager.CheckpointManager.poll", lambda manager: None)
    done = train("checkpoint.every=8")
    assert done.code == 6 and "the loss is nan" in done.err
    assert "cannot write" in done.out and "step-00000008" in done.out
