"""An estimate follows from its counts, and nothing that takes longer is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.estimate import Estimate, Estimator
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import DEVICES, planned_device
from hopescale.cost.holdings import Holdings
from hopescale.cost.pace import memory_pace


def estimate(recipe: str, layout: Layout, *overrides: str, device: str = "H100") -> Estimate:
    config = load_recipe(recipe, list(overrides)).config
    return Estimator(Holdings(config), DEVICES[device]).step(config, layout)


def test_a_transformer_alone_runs_at_the_efficiency():
    found = estimate("transformer_170m", Layout(), "train.recompute=none")
    config = load_recipe("transformer_170m").config
    flops = flops_per_token(config.model, 4096) * 512 * 1024
    # Attention's scores are computed again.
    assert found.seconds["compute"] == pytest.approx(flops / (0.5 * DEVICES["H100"].peak_flops), rel=0.1)
    assert 0.4 < found.mfu < 0.5
    assert found.tps * found.step_s == pytest.approx(512 * 1024)


def test_what_each_axis_adds():
    assert estimate("transformer_170m", Layout(tp=2)).seconds["tensor"] > 0
    assert estimate("transformer_170m", Layout(dp=2)).seconds["data"] > 0
    piped = estimate("transformer_170m", Layout(pp=2))
    assert piped.seconds["idle"] > 0 and piped.seconds["pipeline"] > 0
    interleaved = estimate("transformer_170m", Layout(pp=2, virtual_stages=2))
    assert interleaved.seconds["idle"] < 0.6 * piped.seconds["idle"]
    assert interleaved.seconds["pipeline"] > piped.seconds["pipeline"]


def test_beyond_a_node_data_takes_longer():
    near, far = (estimate("transformer_170m", Layout(dp=dp)) for dp in (8, 16))
    assert far.seconds["data"] > 5 * near.seconds["data"]


def test_calls_of_a_chunk_loop_bound_it_from_below():
    small, large = (estimate("hope_170m", Layout(), f"train.micro_batch_size={size}") for size in (1, 2))
    assert large.seconds["compute"] == pytest.approx(small.seconds["compute"] / 2, rel=0.1)


def test_pieces_between_resets_run_side_by_side():
    long = ("train.seq_len=8192", "train.micro_batch_size=1")
    resets, far = "model.mixers.hope.reset_every=512", "model.mixers.hope.far={chunk_size: 2048}"
    plain, pieces, both = (estimate("hope_170m", Layout(), *long, *more) for more in ((), (resets,), (resets, far)))
    # 12 heads, 192 heads of pieces, on 132 multiprocessors; all else takes as long.
    assert 4 < plain.seconds["compute"] / pieces.seconds["compute"] < 132 / 12
    assert pieces.seconds["compute"] < both.seconds["compute"] < plain.seconds["compute"]
    loop, shorter = (estimate("hope_170m", Layout(), *long, "train.backend=torch", *more) for more in ((), (resets,)))
    assert shorter.seconds["compute"] < loop.seconds["compute"]


def test_the_pace_of_memories():
    recipe = ["train.seq_len=8192", "train.micro_batch_size=2"]
    recipe += ["model.mixers.hope={reset_every: 512, far: {chunk_size: 2048}}"]
    found = memory_pace(load_recipe("hope_170m", recipe).config, Layout(tp=2))
    near, far = found["hope"], found["hope.far"]
    assert (near["pieces"], near["programs"], near["chunks"]) == (16, 16 * 2 * 12 // 2, 512 // 64)
    assert (far["pieces"], far["programs"], far["chunks"]) == (1, 2 * 12 // 2, 4)
    weights = 2 * 64 * 64
    assert far["state_bytes"] == 4 * (4 * weights) * (2 * 12 // 2)


def test_ranks_on_a_cpu_share_it():
    one, two = planned_device("cpu", 1), planned_device("cpu", 2)
    assert two.memory == one.memory / 2
    assert replace(one, memory=0).call_s == 0
