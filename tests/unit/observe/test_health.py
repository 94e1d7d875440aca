from __future__ import annotations

import json

import pytest

from hopescale.common.errors import DivergedError
from hopescale.observe.health import LossWatch

NAN, INF = float("nan"), float("inf")


def nowhere() -> str:
    pytest.fail("the position was asked for although nothing is wrong")


def fill(watch: LossWatch, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        watch.check(step, loss, 1.0, nowhere)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "message"),
    [
        (NAN, 1.0, "the loss is nan"),
        (INF, None, "the loss is inf"),
        (2.0, NAN, r"the gradient norm is nan \(loss 2.0000\)"),
        (2.0, INF, "the gradient norm is inf"),
    ],
)
@pytest.mark.parametrize("spike", [None, 3.0])
def test_what_is_not_finite_stops_the_run(loss: float, grad_norm: float | None, message: str, spike: float | None):
    watch = LossWatch(spike)
    with pytest.raises(DivergedError, match=f"step 7: {message}") as raised:
        watch.check(7, loss, grad_norm, lambda: "source text, samples 16 to 31")
    assert raised.value.message.endswith("batch: source text, samples 16 to 31")
    assert "checkpoints are untouched" in raised.value.hint
    assert raised.value.exit_code == 6
    assert watch.state_dict() == {"losses": []}


def test_a_spike_stops_the_run_and_stays_out_of_the_window():
    watch = LossWatch(3.0)
    fill(watch, [4.0] * 16 + [2.0] * 16)
    watch.check(33, 6.0, 1.0, nowhere)
    before = watch.state_dict()
    with pytest.raises(DivergedError, match=r"the loss 9.5000 is 6.44 nats above the mean 3.0625 of the last 32"):
        watch.check(34, 9.5, 1.0, lambda: "here")
    assert watch.state_dict() == before


def test_a_spike_needs_a_full_window():
    watch = LossWatch(3.0)
    fill(watch, [1.0] * 30 + [99.0])
    watch.check(32, 1.0, None, nowhere)
    with pytest.raises(DivergedError, match="nats above"):
        watch.check(33, 99.0, None, lambda: "here")


def test_without_a_limit_only_what_is_not_finite_counts():
    watch = LossWatch(None)
    fill(watch, [1.0] * 40 + [99.0])


def test_a_resumed_watch_judges_alike():
    losses = [3.0 + 1 / (step + 1) for step in range(40)]
    whole, first, second = LossWatch(1.0), LossWatch(1.0), LossWatch(1.0)
    fill(whole, losses)
    fill(first, losses[:20])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    fill(second, losses[20:])
    assert second.state_dict() == whole.state_dict()
    messages = []
    for watch in (whole, second):
        with pytest.raises(DivergedError) as raised:
            watch.check(41, 4.5, 1.0, lambda: "here")
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
