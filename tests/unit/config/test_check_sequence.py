from __future__ import annotations

import pytest

from hopescale.config.check import check
from hopescale.config.load import load_recipe

BROKEN = [
    (["parallel.cp=3"], "train.seq_len", "128 is not a multiple of parallel.cp = 3"),
    (
        ["parallel.cp=4", "train.segments=4"],
        "train.seq_len",
        "128 / (parallel.cp * train.segments = 4 * 4 = 16) = 8 tokens of a piece are no whole chunks of 32 tokens of "
        "model.mixers.hope",
    ),
    (
        ["train.segments=4", "model.mixers.hope.far.chunk_size=64"],
        "train.seq_len",
        "128 / (train.segments = 4) = 32 tokens of a piece are no whole chunks of 64 tokens of model.mixers.hope",
    ),
    (["parallel.cp=2", "parallel.zero=2"], "parallel.zero", "2 needs parallel.cp of 1, it is 2"),
    (
        ["train.segments=8", "parallel.tp=32", "parallel.sequence_parallel=true"],
        "parallel.sequence_parallel",
        "16 tokens of a piece are not a multiple of parallel.tp = 32, which it shares out",
    ),
    (["parallel.cp=0"], "parallel.cp", "must be at least 1, is 0"),
]


@pytest.mark.parametrize(("overrides", "key", "message"), BROKEN)
def test_what_cannot_be_cut_is_refused(overrides: list[str], key: str, message: str):
    loaded = load_recipe("debug", overrides)
    found = {problem.key: problem.message for problem in check(loaded.config, loaded.origins)}
    assert found[key] == message


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.cp=2", "train.segments=2", "parallel.zero=1", "parallel.dp=1"],
        ["parallel.cp=8", "model.mixers.hope.kind=attention"],
        ["train.segments=8", "model.mixers.hope.kind=titans", "model.mixers.hope.composition=mal"],
        ["parallel.cp=8", "model.mixers.hope.kind=titans", "model.mixers.hope.composition=mag"],
        ["train.segments=2", "parallel.cp=2", "model.within_documents=true", "data.sources.main={path: text}"],
    ],
)
def test_what_can_be_cut_passes(overrides: list[str]):
    loaded = load_recipe("debug", overrides)
    assert check(loaded.config, loaded.origins) == []
