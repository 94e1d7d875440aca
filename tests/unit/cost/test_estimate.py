"""An estimate follows from its counts, and nothing that takes longer is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.estimate import Estimate, Estimator
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import DEVICES, Device, planned_device, trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.pace import memory_pace
from hopescale.cost.params import count_params
from hopescale.cost.roofline import between_products_bytes, equal_transformer, memory_seconds, waves
from tools.plan_tables import beside


def estimate(recipe: str, layout: Layout, *overrides: str, device: str = "H100") -> Estimate:
    config = load_recipe(recipe, list(overrides)).config
    return Estimator(Holdings(config), DEVICES[device]).step(config, layout)


def test_a_transformer_alone_runs_at_the_efficiency():
    found = estimate("transformer_170m", Layout(), "train.recompute=none")
    config = load_recipe("transformer_170m").config
    flops = flops_per_token(config.model, 4096) * 512 * 1024
    products = flops / (0.6 * DEVICES["H100"].peak_flops)
    each = between_products_bytes(config.model, config.model.mixers["attention"], "bf16") * config.model.num_layers
    between = each * 512 * 1024 / (0.9 * DEVICES["H100"].bandwidth)
    # Attention's scores are computed again.
    assert found.seconds["compute"] == pytest.approx(products + between, rel=0.1)
    assert 0.25 < found.mfu < 0.5
    assert found.tps * found.step_s == pytest.approx(512 * 1024)


def test_what_each_axis_adds():
    assert estimate("transformer_170m", Layout(tp=2)).seconds["tensor"] > 0
    assert estimate("transformer_170m", Layout(dp=2)).seconds["data"] > 0
    piped = estimate("transformer_170m", Layout(pp=2))
    assert piped.seconds["idle"] > 0 and piped.seconds["pipeline"] > 0
    interleaved = estimate("transformer_170m", Layout(pp=2, virtual_stages=2))
    assert interleaved.seconds["idle"] < 0.6 * piped.seconds["idle"]
    assert interleaved.seconds["pipeline"] > piped.seconds["pipeline"]


def test_beyond_a_node_a_ring_has_the_adapters_of_its_members():
    near, far = (estimate("transformer_170m", Layout(dp=dp)) for dp in (8, 16))
    # All eight adapters of a node, of 400 Gbit/s each, against NVLink.
    assert far.seconds["data"] / near.seconds["data"] == pytest.approx((15 / 16) / (7 / 8) * 450 / 400)
    split, alone = (estimate("transformer_170m", Layout(dp=16, tp=tp)).seconds["data"] for tp in (2, 4))
    assert split / alone == pytest.approx(1, rel=0.05)  # half the bytes, and half the adapters


def test_a_head_is_a_program_and_programs_go_in_waves():
    model = ("model.d_model=2048", "model.num_heads=32", "train.seq_len=4096", "model.head_dim=64")
    config = load_recipe("hope_1.3b", [*model, "train.micro_batch_size=8"]).config
    (mixer,) = config.model.mixers.values()
    device = DEVICES["H200"]
    assert [waves(132, device, 8), waves(133, device, 8), waves(264, device, 4), waves(265, device, 4)] == [1, 2, 1, 2]
    # 256 programs are one wave of 64 chunks; two programs of 4 warps over 4 schedulers.
    cycles = 64 * (43_145 + 166_234) * 2 * 4 / 4 / 0.45
    assert memory_seconds(config, Layout(), mixer, "mlp", device) == pytest.approx(cycles / 1.755e9)
    # Half of them take as long: a warp does not run faster alone.
    half = memory_seconds(config, Layout(tp=2), mixer, "mlp", device)
    assert half == pytest.approx(cycles / 1.755e9)
    again = memory_seconds(config, Layout(), mixer, "mlp", device, again=True)
    assert again == pytest.approx(cycles / 1.755e9 * (1 + 43_145 / (43_145 + 166_234)))
    wide = load_recipe("hope_1.3b", [*model, "train.micro_batch_size=8", "train.kernel_precision=tf32x3"]).config
    ratio = 2 * (174_066 + 633_711) / (43_145 + 166_234)  # two waves of 8 warps
    assert memory_seconds(wide, Layout(), mixer, "mlp", device) == pytest.approx(ratio * cycles / 1.755e9)


def test_a_block_beside_that_of_the_equal_transformer():
    config = load_recipe("hope_1.3b", ["train.micro_batch_size=8"]).config
    other = equal_transformer(config.model)
    ours, theirs = (count_params(model)["total"] for model in (config.model, other))
    assert theirs == pytest.approx(ours, rel=0.02)
    estimator = Estimator(Holdings(config), DEVICES["H200"])
    assert estimator.beside_transformer(config, Layout()) == pytest.approx(0.39, abs=0.02)
    transformer = load_recipe("transformer_170m").config
    assert Estimator(Holdings(transformer), DEVICES["H200"]).beside_transformer(transformer, Layout()) is None


def test_a_block_beside_a_transformers_by_memories_recomputation_and_length():
    def ratio(memory: str, recompute: str, seq_len: int) -> float:
        config = beside(memory, recompute, seq_len)
        return Estimator(Holdings(config), DEVICES["H200"]).beside_transformer(config, Layout())

    # The goals were 0.45 and 0.7 at 4,096 tokens, and above 1 with linear memories from 16,384 on.
    least = {("mlp", "none"): 0.43, ("mlp", "block"): 0.45, ("linear", "none"): 0.79, ("linear", "block"): 0.8}
    assert {case: 0 <= ratio(*case, 4096) - bound < 0.05 for case, bound in least.items()} == dict.fromkeys(least, True)
    assert all(ratio("linear", how, seq_len) > 1 for how in ("none", "block") for seq_len in (16_384, 32_768))


def test_calls_of_a_chunk_loop_bound_it_from_below():
    small, large = (estimate("hope_170m", Layout(), f"train.micro_batch_size={size}") for size in (1, 2))
    assert large.seconds["compute"] == pytest.approx(small.seconds["compute"] / 2, rel=0.1)


def test_pieces_between_resets_run_side_by_side():
    long = ("train.seq_len=8192", "train.micro_batch_size=1")
    resets, far = "model.mixers.hope.reset_every=512", "model.mixers.hope.far={chunk_size: 2048}"
    plain, pieces, both = (estimate("hope_170m", Layout(), *long, *more) for more in ((), (resets,), (resets, far)))
    # 12 heads, 192 heads of pieces, on 132 multiprocessors that run two each; all else takes as long.
    assert 4 < plain.seconds["compute"] / pieces.seconds["compute"] < 192 / 12
    assert pieces.seconds["compute"] < both.seconds["compute"] < plain.seconds["compute"]
    loop, shorter = (estimate("hope_170m", Layout(), *long, "train.backend=torch", *more) for more in ((), (resets,)))
    assert shorter.seconds["compute"] < loop.seconds["compute"]


def test_chunks_that_pieces_of_documents_run_again_take_time():
    def more(*settings: str) -> float:
        settings = ("train.seq_len=8192", "train.micro_batch_size=1", *settings)
        plain, cut = (
            estimate("hope_170m", Layout(), *settings, f"model.within_documents={it}") for it in (False, True)
        )
        return cut.seconds["compute"] - plain.seconds["compute"]

    four, long = "train.segments=4", "model.mixers.hope.chunk_size=128"
    assert more() == 0 < more(four)
    assert more(four, long) == pytest.approx(2 * more(four))
    assert more("train.segments=2") < more(four) < more("train.segments=8")


def test_the_pace_of_memories():
    recipe = ["train.seq_len=8192", "train.micro_batch_size=2"]
    recipe += ["model.mixers.hope={reset_every: 512, far: {chunk_size: 2048}}"]
    found = memory_pace(load_recipe("hope_170m", recipe).config, Layout(tp=2), DEVICES["H100"])
    near, far = found["hope"], found["hope.far"]
    assert (near["pieces"], near["programs"], near["chunks"]) == (16, 16 * 2 * 12 // 2, 512 // 64)
    assert (far["pieces"], far["programs"], far["chunks"]) == (1, 2 * 12 // 2, 4)
    weights = 2 * 64 * 64
    assert far["state_bytes"] == 4 * (4 * weights) * (2 * 12 // 2)


def pace_of(device: Device, *settings: str) -> tuple[int, int | None, int | None]:
    found = memory_pace(load_recipe("hope_1.3b", list(settings)).config, Layout(), device)["hope"]
    return found["programs"], found["waves"], found["at_once"]


def test_waves_are_those_of_the_kernel_that_runs():
    h100, narrow = DEVICES["H100"], ("model.num_heads=32", "train.micro_batch_size=8")
    assert pace_of(h100, "train.micro_batch_size=16") == (256, 2, 132)
    assert pace_of(h100, *narrow) == (256, 1, 264)
    assert pace_of(h100, *narrow, "train.kernel_precision=tf32x3") == (256, 2, 132)
    assert pace_of(DEVICES["A100"], *narrow) == (256, 2, 216)
    assert pace_of(h100, *narrow, "train.backend=torch") == (256, None, None), "a loop has no waves"
    assert pace_of(planned_device("cpu", 1), *narrow, "train.device=cpu") == (256, None, None)


def assumed(recipe: str, device: str, *settings: str, compared: bool = False) -> str:
    config = trained_on(load_recipe(recipe, list(settings)).config, device)
    return "; ".join(Estimator(Holdings(config), planned_device(device, 1)).assumptions(compared=compared))


def test_what_is_not_counted_is_said():
    for recipe, pieces in (
        ("deltanet_1.3b", "linear attention's chunks"),
        ("ttt_mlp_1.3b", "TTT's mini-batches"),
        ("titans_mac_1.3b", "MAC's segments"),
    ):
        line = f"calls of {pieces}, one after the other, are not counted"
        assert line in assumed(recipe, "H100") and line not in assumed(recipe, "cpu")
    assert not any("calls" in assumed(recipe, "H100") for recipe in ("hope_1.3b", "titans_1.3b", "transformer_1.3b"))


def test_counts_that_are_those_of_something_else_are_said():
    other_gpu, other_products = "for sm_90; another GPU's may differ", "tf32 count as those of tf32x3"
    fp32 = ("train.precision=fp32", "train.kernel_precision=tf32")
    assert [other_gpu in assumed("hope_1.3b", name) for name in DEVICES] == [True, False, False, True]
    assert other_gpu not in assumed("transformer_1.3b", "A100")
    assert other_products in assumed("hope_1.3b", "H100", *fp32)
    assert other_products not in assumed("hope_1.3b", "H100", fp32[0])
    rotary = "rotary positions are torch's"
    assert f"the Transformer's {rotary}" in assumed("hope_1.3b", "H100", compared=True)
    assert rotary not in assumed("hope_1.3b", "H100") + assumed("hope_1.3b", "cpu", compared=True)
    assert f"attention's {rotary}" in assumed("transformer_1.3b", "H100")


def test_ranks_on_a_cpu_share_it():
    one, two = planned_device("cpu", 1), planned_device("cpu", 2)
    assert two.memory == one.memory / 2
    assert replace(one, memory=0).call_s == 0
