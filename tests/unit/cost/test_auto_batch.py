"""`train.micro_batch_size: auto` takes the largest micro batch that fits, of those that divide a replica's batch."""

from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import choose_micro_batch, kept_size, with_micro_batch
from hopescale.cost.hardware import trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.search import USABLE, fullest

# 24 sequences a step.
OVERRIDES = ("train.micro_batch_size=auto", "train.seq_len=128", "train.global_batch_tokens=3072")


@pytest.fixture
def config() -> RunConfig:
    return load_recipe("debug", OVERRIDES).config


def peak(config: RunConfig, layout: Layout, size: int, device: str) -> float:
    config = trained_on(with_micro_batch(config, size), device)
    return fullest(Holdings(config), config, layout, exact=True)


@pytest.mark.parametrize("device", ["cpu", "H100"])
@pytest.mark.parametrize(("dp", "fitting", "next_larger"), [(1, 6, 8), (1, 8, 12), (2, 4, 6), (8, 1, 3)])
def test_it_is_the_largest_that_fits_and_divides(
    config: RunConfig, device: str, dp: int, fitting: int, next_larger: int
):
    layout = Layout(dp=dp)
    need, more = (peak(config, layout, size, device) for size in (fitting, next_larger))
    for memory in (need, (need + more) / 2):
        chosen = choose_micro_batch(config, layout, device, 1.001 * memory / USABLE)
        assert (chosen.size, chosen.peak) == (fitting, need)


def test_all_of_a_step_at_once_where_there_is_room_and_none_where_there_is_not(config: RunConfig):
    assert choose_micro_batch(config, Layout(dp=2), "H100", 1e15).size == 12
    with pytest.raises(ConfigError, match=r"auto, but none fits: a step of one sequence takes \d+.* of H100's 1.0MiB"):
        choose_micro_batch(config, Layout(), "H100", 2**20)


def test_micro_batches_interleave_in_groups(config: RunConfig):
    layout = Layout(pp=2, virtual_stages=1)
    assert choose_micro_batch(config, layout, "H100", 1e15).size == 24
    config = load_recipe("debug", [*OVERRIDES, "model.num_layers=4"]).config
    assert choose_micro_batch(config, Layout(pp=2, virtual_stages=2), "H100", 1e15).size == 12


def test_a_run_keeps_its_own_where_it_divides(config: RunConfig):
    assert kept_size(with_micro_batch(config, 6), config, Layout(dp=2)) == 6
    assert kept_size(with_micro_batch(config, 8), config, Layout(dp=2)) is None
    assert kept_size(config, config, Layout()) is None
