from __future__ import annotations

import json

import pytest

from hopescale.observe.health import LossWatch

NAN, INF = float("nan"), float("inf")


def fill(watch: LossWatch, losses: list[float], norm: float = 1.0) -> None:
    assert [watch.judge(loss, norm) for loss in losses] == [None] * len(losses)


@pytest.mark.parametrize(
    ("loss", "norms", "message"),
    [
        (NAN, (1.0, 0.0), "the loss is nan"),
        (INF, (1.0, 0.0), "the loss is inf"),
        (2.0, (NAN, 0.0), "the gradient norm is nan (loss 2.0000)"),
        (2.0, (INF, 0.0), "the gradient norm is inf (loss 2.0000)"),
        (2.0, (1.0, INF), "the gradient norm is inf (loss 2.0000)"),
    ],
)
@pytest.mark.parametrize("spike", [None, 3.0])
def test_what_is_not_finite_is_refused(loss: float, norms: tuple[float, float], message: str, spike: float | None):
    watch = LossWatch(spike, spike)
    assert watch.judge(loss, *norms) == message
    assert watch.state_dict() == {"losses": [], "norms": [], "refused": 1, "in_a_row": 1}


def test_a_spike_is_refused_and_stays_out_of_the_window():
    watch = LossWatch(3.0)
    fill(watch, [4.0] * 16 + [2.0] * 16)
    assert watch.judge(6.0, 1.0) is None
    before = watch.state_dict()
    problem = watch.judge(9.5, 1.0)
    assert problem.startswith("the loss 9.5000 is 6.44 nats above the mean 3.0625 of the last 32 (train.loss_spike=3)")
    assert watch.state_dict() == before | {"refused": 1, "in_a_row": 1}


def test_a_norm_above_its_mean_is_refused():
    watch = LossWatch(None, 5.0, window=4)
    fill(watch, [1.0] * 3, norm=0.5)
    assert watch.judge(1.0, 99.0) is None, "the window is not full yet"
    fill(watch, [1.0] * 4, norm=0.5)
    assert watch.judge(99.0, 2.5) is None, "five times the mean is allowed, and no loss is looked at"
    problem = watch.judge(1.0, 6.5)
    assert problem == "the gradient norm 6.5 is 6.5 times the mean 1 of the last 4 (train.norm_spike=5)"


def test_a_spike_needs_a_full_window():
    watch = LossWatch(3.0)
    fill(watch, [1.0] * 30 + [99.0, 1.0])
    assert "nats above" in watch.judge(99.0, 1.0)


def test_a_good_step_ends_a_row():
    watch = LossWatch(3.0)
    for loss in (NAN, NAN, 1.0, NAN):
        watch.judge(loss, 1.0)
    assert (watch.refused, watch.in_a_row) == (3, 1)


def test_a_resumed_watch_judges_alike():
    losses = [3.0 + 1 / (step + 1) for step in range(40)]
    whole, first, second = (LossWatch(1.0, 2.0) for _ in range(3))
    fill(whole, losses)
    fill(first, losses[:20])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fill(second, losses[20:])
    assert second.state_dict() == whole.state_dict()
    problems = [[watch.judge(4.5, 1.0), watch.judge(3.0, 2.5)] for watch in (whole, second)]
    assert problems[0] == problems[1] and all(problems[0])


def test_a_watch_saved_before_there_were_norms_goes_on():
    watch = LossWatch(1.0)
    watch.load_state_dict({"losses": [3.0] * 32})
    assert "nats above" in watch.judge(4.5, 1.0) and watch.refused == 1
