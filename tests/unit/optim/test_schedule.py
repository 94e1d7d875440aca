from __future__ import annotations

import pytest

from hopescale.config.schema import ScheduleConfig
from hopescale.optim.schedule import learning_rate

COSINE = ScheduleConfig(warmup_steps=10, min_lr_ratio=0.1)
WSD = ScheduleConfig(name="wsd", warmup_steps=10, min_lr_ratio=0.1, decay_fraction=0.2)


def rates(schedule: ScheduleConfig, *steps: int, total: int = 110) -> list[float]:
    return [learning_rate(step, 2.0, total, schedule) for step in steps]


@pytest.mark.parametrize("schedule", [COSINE, WSD])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule: ScheduleConfig):
    assert rates(schedule, 1, 5, 10) == pytest.approx([0.2, 1.0, 2.0])


def test_cosine_at_known_steps():
    """A quarter, half, all of the way: (1 + cos(pi x)) / 2 of the way from 0.2 to 2."""
    assert rates(COSINE, 35, 60, 110) == pytest.approx([0.2 + 1.8 * (1 + 0.5**0.5) / 2, 1.1, 0.2])


def test_wsd_is_stable_and_then_falls_on_a_line():
    assert rates(WSD, 11, 50, 88) == pytest.approx([2.0] * 3)
    assert rates(WSD, 99, 110) == pytest.approx([1.1, 0.2])


@pytest.mark.parametrize("schedule", [COSINE, WSD])
def test_steps_beyond_the_horizon_keep_the_last_rate(schedule: ScheduleConfig):
    assert rates(schedule, 111, 10_000) == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_a_run_without_warm_up_starts_at_the_peak(name: str):
    first, second = rates(ScheduleConfig(name=name), 1, 2, total=1000)
    assert first == pytest.approx(2.0, rel=1e-4) and second <= first


@pytest.mark.parametrize("schedule", [COSINE, WSD])
def test_the_rate_depends_on_the_step_alone(schedule: ScheduleConfig):
    steps = list(range(1, 111))
    forwards, backwards = rates(schedule, *steps), rates(schedule, *reversed(steps))
    assert forwards == backwards[::-1]
    assert max(forwards) == pytest.approx(2.0)
    assert all(later <= earlier for earlier, later in zip(forwards[9:], forwards[10:], strict=False))


def test_a_ratio_of_one_never_decays_and_of_zero_ends_at_nothing():
    assert rates(ScheduleConfig(min_lr_ratio=1.0), 1, 70, 110) == pytest.approx([2.0] * 3)
    assert rates(ScheduleConfig(min_lr_ratio=0.0), 110) == [0.0]
