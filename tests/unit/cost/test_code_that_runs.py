"""A plan for a GPU counts what the code keeps that the model runs there: kernels, or torch's operations."""

from __future__ import annotations

import pytest

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import MixerConfig, RunConfig
from hopescale.cost.carried import carried_bytes
from hopescale.cost.device_memory import DeviceMemory, device_memory_of_stage
from hopescale.cost.hardware import trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.kernels import kernel_activations
from hopescale.cost.micro_batch import MicroBatch

SIZES = ("train.precision=bf16", "train.seq_len=512", "train.global_batch_tokens=2Ki", "model.num_layers=1")
MAPS = "optim.groups.levels={{rule: {}, match: [{}]}}"
GATE, DOWN = "'*.fast.gate.weight'", "'*.fast.down.weight'"


def planned(*overrides: str, layout: Layout | None = None) -> DeviceMemory:
    config = trained_on(load_recipe("debug", [*SIZES, *overrides]).config, "H100")
    return device_memory_of_stage(Holdings(config), config, layout or Layout(), 0)


def mixer_of(*overrides: str) -> tuple[RunConfig, MixerConfig]:
    config = load_recipe("debug", [*SIZES, *overrides]).config
    return config, config.model.mixers["hope"]


def kept(*overrides: str, layout: Layout | None = None) -> float:
    return planned(*overrides, layout=layout).bytes["activations"]


def packed(*overrides: str) -> float:
    config = trained_on(load_recipe("debug", [*SIZES, *overrides]).config, "H100")
    micro = MicroBatch.of(config.train, Layout())
    return kernel_activations(config.model, config.model.mixers["hope"], micro).kept


@pytest.mark.parametrize("how", [("train.segments=2", None), ("parallel.cp=2", Layout(cp=2))])
def test_no_kernel_makes_streams_where_a_convolution_goes_on_from_the_piece_before(how: tuple[str, Layout | None]):
    pieces, layout = how
    half = ("train.seq_len=256", "train.global_batch_tokens=1Ki")
    no_conv = "model.mixers.hope.conv_width=null"
    own_states = 3 * packed()  # of the four sequences, which otherwise begin with one
    assert kept(no_conv, pieces, layout=layout) == kept(no_conv, *half) + own_states
    whole = kept(*half) + own_states
    assert whole < kept(pieces, layout=layout) < kept("train.backend=torch", *half)
    # Of three streams, inputs in bf16 and two results in float32, instead of one beside the map in; width 64.
    more = 1024 * 64 * 3 * ((2 + 4 + 4) - (2 + 4))
    assert kept(pieces, layout=layout) - whole == pytest.approx(more, rel=0.15)


def test_kernels_pack_the_learned_weights_once_and_a_state_for_each_sequence():
    one, four = ("train.micro_batch_size=1",), ("train.micro_batch_size=4",)
    assert packed(*four) == packed(*one) == packed(*four, "model.mixers.hope.reset_every=128")
    for alone in ("train.segments=2", "model.mixers.hope.reset_every=512"):
        assert packed(*four, alone) == 4 * packed(*one)


def test_deep_models_hold_most_when_a_piece_has_been_run_again():
    wide = ("model.d_model=256", "train.micro_batch_size=4", "train.segments=4")
    assert planned(*wide).moment != "again"
    deep = planned(*wide, "model.num_layers=8")
    assert deep.moment == "again"
    assert deep.bytes["workspace"] > 8 * 1.5 * carried_bytes(*mixer_of(*wide), 128), "states behind the piece"


def test_segments_of_titans_go_on_from_one_another():
    def of_conv(segments: int) -> float:
        mac = "kind: titans, composition: mac, chunk_size: 32, persistent_tokens: 4"
        sizes = (f"train.seq_len={32 * segments}", f"train.global_batch_tokens={128 * segments}")
        with_it, without = (kept(*sizes, f"model.mixers.hope={{{mac}, conv_width: {width}}}") for width in (4, "null"))
        return (with_it - without) / segments

    assert of_conv(2) > 4 * of_conv(1)


def test_no_kernel_joins_first_maps_whose_inputs_are_looked_at():
    wide, attention = "model.cms.levels.fast.d_ff=4096", "model.mixers.hope.kind=attention"
    width = 2048 * 4096 * 2
    found = {rule: planned(wide, attention, MAPS.format(rule, GATE)) for rule in ("muon", "dgd")}
    assert found["dgd"].bytes["activations"] - found["muon"].bytes["activations"] == width
    found = {rule: planned(wide, attention, MAPS.format(rule, DOWN)) for rule in ("muon", "dgd")}
    assert found["dgd"].bytes["activations"] == found["muon"].bytes["activations"]
    assert found["dgd"].bytes["workspace"] - found["muon"].bytes["workspace"] == width, "inputs in float32"


def test_what_no_kernel_takes_runs_in_a_loop_that_keeps_all_chunks():
    odd = ("model.d_model=192", "model.num_heads=4", "train.recompute=none")  # heads of 48
    memory = [planned(*odd, *how).peak for how in ((), ("train.backend=torch",))]
    assert memory[0] == pytest.approx(memory[1], rel=0.1)
    assert memory[0] > 2 * planned(*odd[:2], "train.recompute=chunks").peak
