from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from hopescale.config.layout import Layout
from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
    SelfModifyingConfig,
    TrainConfig,
)
from hopescale.cost.flops import block_flops, flops_per_token
from hopescale.cost.holdings import Holdings, cut_blocks

SMALL = ModelConfig(vocab_size=256, d_model=64, num_heads=4, cms=CmsConfig(levels={"mlp": LevelConfig(d_ff=128)}))


def dearest(model: ModelConfig, sizes: list[int]) -> float:
    block = block_flops(model, 128).total
    head = flops_per_token(model, 128) - model.num_layers * block
    assert head == pytest.approx(6 * model.vocab_size * model.d_model)
    return max(size * block + head * (stage == len(sizes) - 1) for stage, size in enumerate(sizes))


def all_cuts(blocks: int, stages: int) -> list[list[int]]:
    cuts = (([0, *inner, blocks]) for inner in combinations(range(1, blocks), stages - 1))
    return [[b - a for a, b in zip(cut, cut[1:], strict=False)] for cut in cuts]


@pytest.mark.parametrize("vocab_size", [128, 2048, 16_384, 65_536])
@pytest.mark.parametrize("mixer", [SelfModifyingConfig(), AttentionConfig()], ids=lambda mixer: mixer.kind)
def test_no_cut_has_a_cheaper_dearest_stage(mixer: MixerConfig, vocab_size: int):
    for blocks in range(1, 9):
        model = replace(SMALL, mixers={"mixer": mixer}, vocab_size=vocab_size, num_layers=blocks)
        for stages in range(1, blocks + 1):
            cut = cut_blocks(model, 128, stages)
            assert [number for part in cut for number in part] == list(range(blocks))
            sizes = [len(part) for part in cut]
            assert min(sizes) >= 1
            best = min(dearest(model, other) for other in all_cuts(blocks, stages))
            assert dearest(model, sizes) == pytest.approx(best)
            assert sizes[:-1] == sorted(sizes[:-1], reverse=True)


@pytest.mark.parametrize(
    ("vocab_size", "blocks", "stages", "sizes"),
    [
        (128, 8, 4, [2, 2, 2, 2]),
        (128, 6, 4, [2, 2, 1, 1]),
        (128, 5, 2, [3, 2]),
        (65_536, 6, 3, [3, 2, 1]),
        (65_536, 3, 3, [1, 1, 1]),
        (128, 3, 1, [3]),
    ],
)
def test_cuts_by_hand(vocab_size: int, blocks: int, stages: int, sizes: list[int]):
    model = replace(SMALL, vocab_size=vocab_size, num_layers=blocks)
    assert [len(part) for part in cut_blocks(model, 128, stages)] == sizes


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="4 blocks cannot be cut into 5 stages"):
        cut_blocks(replace(SMALL, num_layers=4), 128, 5)


def test_slices_go_round_the_ranks():
    holdings = Holdings(RunConfig(model=replace(SMALL, num_layers=8, vocab_size=128), train=TrainConfig(seq_len=128)))
    interleaved = Layout(pp=2, virtual_stages=2)
    assert holdings.slices(interleaved, 0) == [range(2), range(4, 6)]
    assert holdings.slices(interleaved, 1) == [range(2, 4), range(6, 8)]
    assert holdings.slices(Layout(pp=2), 1) == [range(4, 8)]
