from __future__ import annotations

import pytest
import torch

from hopescale.config.schema import LevelConfig, ModelConfig
from hopescale.config.schema.model import CmsConfig
from hopescale.cost.params import model_parameters
from hopescale.optim.cadence import Accumulator, Cadence, cadences_of_level

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


@pytest.mark.parametrize(("period", "blocks", "phase"), [(4, 4, 0), (4, 6, 1), (16, 3, 5), (3, 7, 2)])
def test_blocks_of_a_rolling_level_take_turns(period: int, blocks: int, phase: int):
    """Each is due once per period, and never all of them at once: at no step more than an even share, rounded up."""
    level = LevelConfig(update_every_steps=period, phase=phase, rolling=True)
    model = ModelConfig(num_layers=blocks, cms=CmsConfig(levels={"fast": LevelConfig(), "slow": level}))
    cadences = cadences_of_level(model, "slow")
    due = [[n for n, cadence in cadences.items() if cadence.is_due(step)] for step in range(1, period + 1)]
    assert sorted(n for numbers in due for n in numbers) == list(range(blocks))
    assert max(map(len, due)) == -(-blocks // period) and cadences[0] == Cadence(period, phase)
    assert set(cadences_of_level(model, "fast").values()) == {Cadence()}
    planned = {p.name.split(".")[1]: p.phase for p in model_parameters(model) if p.level == "slow"}
    assert planned == {str(n): cadence.phase for n, cadence in cadences.items()}


def test_a_level_that_lies_in_some_blocks_rolls_over_these():
    levels = {"fast": LevelConfig(), "slow": LevelConfig(update_every_steps=4, rolling=True)}
    model = ModelConfig(num_layers=4, cms=CmsConfig(levels=levels, placement="depth"))
    assert cadences_of_level(model, "slow") == {2: Cadence(4), 3: Cadence(4, 2)}


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
