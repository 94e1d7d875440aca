"""Every choice of a search can be run as it is written."""

from __future__ import annotations

from itertools import islice

import pytest

from hopescale.config.check import check_layout
from hopescale.config.layout import make_layout
from hopescale.config.load import load_recipe
from hopescale.cost.estimate import Estimator
from hopescale.cost.hardware import DEVICES
from hopescale.cost.holdings import Holdings
from hopescale.cost.search import LayoutChoice, choices

SMALL = ["model.num_layers=2", "model.d_model=128", "model.num_heads=8", "train.global_batch_tokens=8Ki"]
M3 = "optim.groups.matrices={rule: m3, match: ['*.up.weight']}"


def found(*overrides: str, ranks: int = 32) -> list[LayoutChoice]:
    config = load_recipe("debug", [*SMALL, *overrides]).config
    return list(choices(Estimator(Holdings(config), DEVICES["H100"]), ranks))


@pytest.mark.parametrize("rule", [[], [M3]], ids=["adamw", "m3"])
def test_what_is_found_passes_the_checks_and_names_its_layout(rule: list[str]):
    chosen = found(*rule)
    kinds = {(choice.config.parallel.shard, choice.config.parallel.shard_weights) for choice in chosen}
    assert kinds == {(None, False), ("node", False), ("node", True)}
    for choice in islice(chosen, 0, None, 7):
        settings = [f"{key}={value}" for key, value in choice.settings().items()]
        loaded = load_recipe("debug", [*SMALL, *rule, *settings])
        assert make_layout(loaded.config, 32) == choice.layout
        check_layout(loaded.config, choice.layout, loaded.origins)


def test_nodes_are_left_out_where_they_cannot_be():
    late = found("model.cms.levels.slow={update_every_steps: 4, lag: 1}")
    pieces = found("train.segments=2", "model.mixers.hope.chunk_size=16", "train.seq_len=64")
    assert {choice.config.parallel.shard for choice in (*late, *found(ranks=8))} == {None}
    assert {choice.config.parallel.shard_weights for choice in pieces} == {False}
    assert "node" in {choice.config.parallel.shard for choice in pieces}
