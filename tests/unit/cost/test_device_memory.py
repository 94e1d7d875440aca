"""Bytes of what lasts, by rule, precision and what replicas share out; the rest is held to runs in `tests/dist`."""

from __future__ import annotations

import pytest

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.comm import SentBytes
from hopescale.cost.device_memory import DeviceMemory, device_memory_of_stage
from hopescale.cost.holdings import Holdings

LASTING = ("weights", "gradients", "accumulators", "masters", "optimizer")


def planned(overrides: list[str], layout: Layout) -> DeviceMemory:
    config = load_recipe("debug", overrides).config
    return device_memory_of_stage(Holdings(config), config, layout, 0)


def lasting(found: DeviceMemory) -> float:
    return sum(found.bytes[kind] for kind in LASTING)


@pytest.mark.parametrize(
    ("zero", "precision", "each"),
    [
        (0, "fp32", 16),
        (1, "fp32", 8 + 8 / 4),
        (2, "fp32", 4 + 16 / 4),
        (3, "fp32", 16 / 4),
        (0, "bf16", 18),
        (1, "bf16", 6 + 12 / 4),
        (2, "bf16", 2 + 16 / 4),
        (3, "bf16", 18 / 4),
    ],
)
def test_adamw_takes_what_the_table_of_zero_says(zero: int, precision: str, each: float):
    # Nearly all parameters are those of the embedding, which follow the precision; two micro batches, so that all
    # gradients are there at the peak.
    overrides = ["model.vocab_size=1M", f"parallel.zero={zero}", f"train.precision={precision}"]
    overrides += ["train.global_batch_tokens=4Ki"]
    found = planned(overrides, Layout(dp=4))
    assert lasting(found) / found.parameters == pytest.approx(each, rel=0.01)


def test_matrices_are_shared_out_whole():
    matrices = "optim.groups.matrices={rule: muon, match: ['*.gate.weight','*.up.weight','*.down.weight']}"
    alone, shared = (planned([matrices, "model.d_model=128"], Layout(dp=dp)) for dp in (1, 4))
    plain = planned(["model.d_model=128"], Layout())
    levels = 2 * 3 * 3 * 128 * 128
    assert plain.bytes["optimizer"] - alone.bytes["optimizer"] == 4 * levels
    assert alone.bytes["optimizer"] - shared.bytes["optimizer"] == pytest.approx(4 * levels * 3 / 4, rel=0.1)


def test_a_first_stage_waits_longest():
    config = load_recipe("debug", ["model.num_layers=8", "train.micro_batch_size=1"]).config
    holdings = Holdings(config)
    stages = [device_memory_of_stage(holdings, config, Layout(pp=4), stage) for stage in range(4)]
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    assert stages[0].bytes["in flight"] > stages[2].bytes["in flight"] > stages[3].bytes["in flight"] == 0


def test_slow_levels_send_less():
    settings = ["model.cms.levels.mid=null", "model.cms.levels.slow.update_every_steps={}"]
    sent = {}
    for period in (1, 4):
        config = load_recipe("debug", [settings[0], settings[1].format(period)]).config
        sent[period] = SentBytes(Holdings(config), Layout(dp=2), 0).per_step()["dp"]
    level = 4 * 2 * (3 * 64 * 128 + 64)
    assert sent[1] - sent[4] == pytest.approx(level * 3 / 4)


def test_hope_7b_on_64_keeps_seven_gib_at_most_where_nodes_share_weights_out():
    nodes, found = ["parallel.shard=node", "train.recompute=block"], {}
    for shares in ("false", "true"):
        config = load_recipe("hope_7b", [*nodes, f"parallel.shard_weights={shares}"]).config
        memory = device_memory_of_stage(Holdings(config), config, Layout(dp=64, node_replicas=8), 0)
        found[shares] = {kind: memory.bytes[kind] / 2**30 for kind in LASTING if kind != "gradients"}
    assert 17 < sum(found["false"].values()) < 18
    assert sum(found["true"].values()) < 7
    assert found["true"]["weights"] == pytest.approx(0.25 + (found["false"]["weights"] - 0.25) / 8, rel=0.01)
