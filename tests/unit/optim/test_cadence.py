from __future__ import annotations

import pytest
import torch

from hopescale.optim.cadence import Accumulator, Cadence

PAIRS = [(period, phase) for period in (1, 2, 3, 5) for phase in range(period)]


@pytest.mark.parametrize(("period", "phase"), PAIRS)
def test_updates_come_once_per_period_and_are_counted(period: int, phase: int):
    cadence = Cadence(period, phase)
    due = [step for step in range(1, 4 * period + 1) if cadence.is_due(step)]
    assert due == list(range(period - phase, 4 * period + 1, period))
    for step in range(4 * period + 1):
        assert cadence.updates(step) == sum(earlier <= step for earlier in due)


def test_phases_spread_levels_of_one_period():
    due = [[step for step in range(1, 9) if Cadence(4, phase).is_due(step)] for phase in range(4)]
    assert due == [[4, 8], [3, 7], [2, 6], [1, 5]]


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_summed_in_float32_and_taken_away(period: int, dtype: torch.dtype):
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    accumulator = Accumulator(parameter, Cadence(period))
    for value in (256.0, 1.0, 1.0):  # bfloat16 cannot hold 257
        parameter.grad = torch.full_like(parameter, value)
        accumulator.take()
        assert parameter.grad is None
    accumulator.take()
    assert accumulator.accumulated_grad().dtype == torch.float32
    assert accumulator.accumulated_grad().tolist() == [258.0, 258.0]
    accumulator.clear()
    assert accumulator.accumulated_grad().tolist() == [0.0, 0.0]


def test_only_slow_parameters_keep_a_tensor_between_steps():
    """What a checkpoint holds of a slow level must stay the same tensor, as loading copies into it."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    fast, slow = Accumulator(parameter, Cadence()), Accumulator(parameter, Cadence(2))
    assert fast.total is None and not fast.persists
    before = slow.total
    parameter.grad = torch.ones(2)
    slow.take()
    slow.clear()
    assert slow.total is before and slow.persists
