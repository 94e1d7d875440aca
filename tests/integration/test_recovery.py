"""Bad steps: one costs itself alone, more of them in a row end the run or send it back to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from hopescale.data.loader import Data
from hopescale.engine import Computed, Engine
from hopescale.engine.schedule import Loop
from hopescale.observe.health import LossWatch
from hopescale.train.trainer import Trainer

if TYPE_CHECKING:
    from conftest import Run

BACK = ("train.recovery.skips=1", "train.recovery.then=lower_rate", "train.recovery.rate_factor=0.25")


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Engine, int], bool]) -> list[int]:
    """Make the loss of the steps NaN of which `is_bad` says so; return the steps that are tried, as a list to come."""
    gradients, loss_of, tried = Engine.gradients, Loop._loss, []

    def spoiled(engine: Engine, step: int, *args, **options):
        tried.append(step)
        with monkeypatch.context() as patch:
            if is_bad(engine, step):
                patch.setattr(Loop, "_loss", lambda *inner: loss_of(*inner) * math.nan)
            return gradients(engine, step, *args, **options)

    monkeypatch.setattr(Engine, "gradients", spoiled)
    return tried


def at_full_rate(engine: Engine, step: int) -> bool:
    """Steps 6 and 7 are bad until the rate is lower."""
    return step in (6, 7) and engine.optimizer.rate_factor == 1


def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the samples that are read for training, as a list to come."""
    batch, indices = Data.batch, []

    def reading(data: Data, wanted):
        indices.extend(wanted)
        return batch(data, wanted)

    monkeypatch.setattr(Data, "batch", reading)
    return indices


def test_a_poisoned_batch_costs_one_step(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, lambda _, step: step == 6)
    options = ("checkpoint.every=1", "checkpoint.keep_last=20", "log.every=100")
    done = train(*options, "--stop-at", 6)
    assert done.code == 0
    assert "skipped step 6: the loss is nan; batch: samples 20 to 23, from source markov, epoch 0, " in done.out
    assert "(1 of at most 3 in a row)" in done.out
    before, after = run.tensors(5), run.tensors(6)
    sums = {name for name in after if ".accumulator." in name}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - sums if "generators" not in name)
    assert any(before[name].any() for name in sums) and not any(after[name].any() for name in sums)
    assert train(*options).code == 0
    skipped = {record["step"]: record for record in run.values() if "steps_skipped" in record}
    assert list(skipped) == [6] and skipped[6]["steps_skipped"] == 1 and skipped[6]["loss"] is None
    assert not any(name.startswith("level/") for name in skipped[6])
    assert run.manifest(10).progress["watch"]["refused"] == 1


def test_a_resume_between_bad_steps_counts_on(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, lambda _, step: step > 5)
    options = ("checkpoint.every=1", "train.recovery.skips=2")
    assert train(*options, "--stop-at", 6).code == 0
    done = train(*options)
    assert done.code == 6 and "step 8: the loss is nan; batch: samples 28 to 31, " in done.err
    assert "(bad step 3 in a row)" in done.err and run.steps()[-1] == 6, "a bad step pushes out no checkpoint"


def test_a_run_goes_back_to_a_lower_rate(train, run: Run, whole, monkeypatch: pytest.MonkeyPatch):
    usual = {record["step"]: record["lr/decay"] for record in whole().values() if record.get("lr/decay")}
    tried = spoil(monkeypatch, at_full_rate)
    done = train(*BACK, "log.every=1")
    assert done.code == 0, done.err
    assert "went back to step-00000004, all learning rates are 0.25 of those in the schedule (return 1 of " in done.out
    assert tried == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10]
    rates = {record["step"]: record["lr/decay"] for record in run.values() if record.get("lr/decay")}
    assert list(rates) == list(range(1, 11)), "every step is recorded once"
    for step, rate in usual.items():
        assert rates[step] == pytest.approx(rate if step <= 4 else rate / 4)
    progress = run.manifest(10).progress
    assert progress["recovery"] == {"returns": 1, "passed_steps": 0, "rate_factor": 0.25}
    assert progress["watch"]["refused"] == 2 and progress["watch"]["in_a_row"] == 0


def test_a_run_that_went_back_resumes_bit_for_bit(train, run: Run, hopescale, tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, at_full_rate)
    assert train(*BACK, "--stop-at", 9).code == 0
    assert train(*BACK).code == 0
    other = type(run)(tmp_path / "other")
    assert hopescale("train", "debug", *tiny, *BACK, "--run-dir", other.path).code == 0
    run.assert_same(other)


def test_a_run_killed_after_it_went_back_stays_there(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint that it went back to knows the rate."""
    with monkeypatch.context() as patch:
        spoil(patch, lambda engine, step: step == 5 if engine.optimizer.rate_factor < 1 else step in (6, 7))
        done = train(*BACK, "train.recovery.skips=0", "train.recovery.max_returns=1")
        assert done.code == 6 and "step 5: the loss is nan" in done.err and "has gone back 1 times before" in done.err
    assert run.latest() == run.checkpoint(4)
    assert run.manifest(4).progress["recovery"]["rate_factor"] == 0.25
    assert train(*BACK).code == 0
    assert run.manifest(10).progress["recovery"]["rate_factor"] == 0.25


def test_a_checkpoint_of_other_runs_is_gone_back_to_and_stays_as_it_is(train, run: Run, monkeypatch):
    """What branches off there has the rates of a run of its own, which never came to the bad steps."""
    with monkeypatch.context() as patch:
        spoil(patch, at_full_rate)
        done = train(*BACK, "checkpoint.keep_at=[5]", "--stop-at", 7)
        assert done.code == 0 and "went back to step-00000005" in done.out, done.err
    assert run.manifest(5).progress["recovery"] == {"returns": 0, "passed_steps": 0, "rate_factor": 1.0}
    assert run.manifest(7).progress["recovery"]["rate_factor"] == 0.25


def test_a_run_goes_back_and_reads_other_data(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    tried, samples = [], read(monkeypatch)
    tried = spoil(monkeypatch, lambda _, step: step == 6 and tried.count(6) == 1)
    done = train("train.recovery.skips=0", "train.recovery.then=other_data", "data.prefetch=0")
    assert done.code == 0, done.err
    assert "went back to step-00000004, with the batches behind those of step 6 (return 1 of at most 3)" in done.out
    # The batches of step 7 were read while step 6 was trained.
    assert samples == list(range(28)) + list(range(24, 48)), "steps 5 to 10 read on behind step 6"
    assert run.manifest(10).progress["recovery"]["passed_steps"] == 2
    assert [record["step"] for record in run.values()] == sorted({record["step"] for record in run.values()})


def test_a_resume_counts_the_batches_that_were_passed_over(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    tried = spoil(monkeypatch, lambda _, step: step == 6 and tried.count(6) == 1)
    back = ("train.recovery.skips=0", "train.recovery.then=other_data")
    assert train(*back, "data.sources.markov.synthetic.num_samples=51", "--stop-at", 8).code == 0
    done = train(*back, "data.sources.markov.synthetic.num_samples=51", "train.steps=11")
    assert done.code == 2 and "the run reads 52 sequences of it" in done.err


def test_there_may_be_no_other_data(train, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, lambda _, step: step == 6)
    few = "data.sources.markov.synthetic.num_samples=42"
    done = train("train.recovery.skips=0", "train.recovery.then=other_data", few)
    assert done.code == 6
    assert "there is no other data: data.sources.markov: the run reads 48 sequences of it" in done.err


def test_without_an_earlier_checkpoint_a_run_ends(train, run: Run, monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch, lambda _, step: step in (3, 4, 5))
    done = train(*BACK, "train.recovery.skips=2")
    assert done.code == 6 and "there is no checkpoint from before step 3 to go back to" in done.err
    assert run.steps() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.recovery.rate_factor=0.1",), "0.1 has no effect: train.recovery.then is stop"),
        (("train.recovery.then=other_data", "train.recovery.rate_factor=0.1"), "has no effect"),
        (("train.recovery.max_returns=2",), "2 has no effect: train.recovery.then is stop"),
        (("train.recovery.then=lower_rate", "checkpoint.every=null"), "nothing to go back to"),
        (("train.norm_spike=1",), "above 1"),
    ],
)
def test_settings_without_an_effect_are_refused(train, settings: tuple[str, ...], message: str):
    done = train(*settings, "--dry-run")
    assert done.code == 2 and message in done.err


LATE = ("log.every=100", "train.validation.every=null", "checkpoint.every=5")
"""Steps 1, 5 and 10 are known at once, all others late."""
COURSES = {
    "skipped": (lambda _, step: step in (3, 7), (), [2, 3, 4, 6, 7, 8, 9]),
    "spikes": (
        lambda *_: False,
        ("train.loss_spike=0.001", "train.norm_spike=1.01", "train.recovery.skips=9"),
        [2, 3, 4, 6, 7, 8, 9],
    ),
    "taken back": (at_full_rate, BACK, [2, 3, 4, 6, 7, 8, 7, 8, 9]),
    "ended": (lambda _, step: step in (6, 7), ("train.recovery.skips=1",), [2, 3, 4, 6, 7, 8]),
}
"""Which steps are bad, settings, and the steps that are not known when their passes have been launched."""


def note_order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the steps whose passes begin and those whose loss is read, in order, as a list to come."""
    gradients, read, happened, steps = Engine.gradients, Computed.read, [], {}

    def noting(engine: Engine, step: int, *args, **options):
        happened.append(("begins", step))
        computed = gradients(engine, step, *args, **options)
        steps[computed] = step
        return computed

    def noting_read(computed: Computed):
        happened.append(("is known", steps[computed]))
        return read(computed)

    monkeypatch.setattr(Engine, "gradients", noting)
    monkeypatch.setattr(Computed, "read", noting_read)
    return happened


@pytest.mark.parametrize("course", COURSES)
def test_a_run_that_learns_late_of_its_steps_is_the_run_that_waits_for_each(
    hopescale, tiny, tmp_path, run: Run, course: str, monkeypatch: pytest.MonkeyPatch
):
    """A run that waits and then updates, and one whose device refuses bad steps while its host waits."""
    is_bad, settings, expected_late = COURSES[course]
    monkeypatch.setitem(LossWatch.__init__.__kwdefaults__, "window", 2)
    ways = {
        "late": (),
        "at once": ((Trainer, "_must_know", lambda *_: True),),
        "before": ((Engine, "is_gated", property(lambda _: False)),),
    }
    ended, orders = {}, {}
    for way, patches in ways.items():
        with monkeypatch.context() as patch:
            for replaced in patches:
                patch.setattr(*replaced)
            spoil(patch, is_bad)
            orders[way] = note_order(patch)
            done = hopescale("train", "debug", *tiny, *LATE, *settings, "--run-dir", tmp_path / way)
        told = [line for line in done.out.splitlines() if "skipped" in line or "went back" in line]
        ended[way] = done.code, told, done.err, type(run)(tmp_path / way)
    code, told, error, expected = ended.pop("before")
    assert code == (6 if course == "ended" else 0) and any("skipped" in line for line in told)
    for *outcome, found in ended.values():
        assert outcome == [code, told, error]
        found.assert_same(expected)
    order = orders["late"]
    places = [place for place, event in enumerate(order) if event[0] == "begins"]
    own = {place: order[place:end] for place, end in zip(places, [*places[1:], len(order)], strict=True)}
    late = [order[place][1] for place in places if ("is known", order[place][1]) not in own[place]]
    assert late == expected_late
