"""`train.micro_batch_size: auto` takes the largest micro batch that fits, of those that divide a replica's batch."""

from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import choose_micro_batch, keeps, planned_bytes, with_micro_batch
from hopescale.cost.hardware import DEVICES
from hopescale.cost.search import USABLE

# 24 sequences a step.
OVERRIDES = ("train.micro_batch_size=auto", "train.seq_len=128", "train.global_batch_tokens=3072")


@pytest.fixture
def config() -> RunConfig:
    return load_recipe("debug", OVERRIDES).config


def peak(config: RunConfig, layout: Layout, size: int, device: str) -> float:
    return planned_bytes(with_micro_batch(config, size), layout, device)


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


def test_stages_have_a_micro_batch_each_in_groups_where_they_interleave(config: RunConfig):
    chosen = choose_micro_batch(config, Layout(pp=2), "H100", 1e15)
    assert (chosen.size, chosen.at_once) == (12, 2)
    assert "fits H100, with 2 or more in a step: " in chosen.describe("H100")
    config = load_recipe("debug", [*OVERRIDES, "model.num_layers=4"]).config
    assert choose_micro_batch(config, Layout(pp=3), "H100", 1e15).size == 8
    assert choose_micro_batch(config, Layout(dp=8, pp=4), "H100", 1e15).size == 1, "three sequences for four stages"
    assert choose_micro_batch(config, Layout(pp=2, virtual_stages=2), "H100", 1e15).size == 12


def test_two_share_ranks_of_sequences_unless_a_gpu_runs_the_heads_of_all_at_once(config: RunConfig):
    assert choose_micro_batch(config, Layout(cp=2), "cpu", 1e15).size == 12, "two are on their way at a time"
    long = load_recipe("hope_1.3b_128k", ["train.micro_batch_size=auto"]).config
    memory = DEVICES["H100"].memory
    for device in ("H100", "cuda"):
        chosen = choose_micro_batch(long, Layout(cp=8), device, memory)
        assert (chosen.size, chosen.at_once) == (4, 1), "64 heads take as long as 32"
    more = load_recipe("hope_1.3b_128k", ["train.micro_batch_size=auto", "train.global_batch_tokens=2Mi"]).config
    assert choose_micro_batch(more, Layout(cp=8), "H100", memory).at_once == 2, "256 heads are two waves"


def test_a_run_keeps_its_own_where_it_divides_and_fits(config: RunConfig):
    def kept(size: int, layout: Layout, memory: float = 1e15) -> bool:
        return keeps(size, config, layout, "H100", memory)

    assert kept(6, Layout(dp=2)) and kept(24, Layout(pp=2))
    assert not kept(8, Layout(dp=2)) and not kept(24, Layout(pp=2, virtual_stages=2))
    need = peak(config, Layout(dp=2), 6, "H100")
    assert kept(6, Layout(dp=2), need) and not kept(6, Layout(dp=2), need - 1)
