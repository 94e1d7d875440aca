"""What a model hands on between pieces of sequences is what the plan counts."""

from __future__ import annotations

import pytest

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.carried import carried_bytes, chunks_rerun, kept_between_pieces, made_again
from hopescale.cost.parameter import FP32
from hopescale.models.block import MIXERS as MODULES
from hopescale.models.handover import BOUNDARY, state_after
from hopescale.parallel.mesh import Mesh
from tests.support.mixers import MIXERS

HOPE = "model.mixers.hope"
OTHERS = {
    "linear attention": ["model.mixers.hope.kind=linear_attention"],
    "ttt": ["model.mixers.hope.kind=ttt", "model.mixers.hope={memory: mlp}"],
    **{name: [f"{HOPE}.kind=titans", f"{HOPE}.composition={name}", f"{HOPE}.window=64"] for name in ("mag", "mal")},
    "no convolution": ["model.mixers.hope.conv_width=null"],
}
NAMES = ("hope", "linear", "narrow memories", "no momentum", "two banks", "far memory", "grouped attention", "mac")


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("position", [32, 96])
@pytest.mark.parametrize("overrides", [*(MIXERS[name] for name in NAMES), MIXERS["sliding window"], *OTHERS.values()])
def test_the_bytes_of_a_state(overrides: list[str], position: int, within: bool):
    settings = ["parallel.cp=2", "train.micro_batch_size=3", f"model.within_documents={str(within).lower()}"]
    config = load_recipe("debug", [*overrides, *settings]).config
    (mixer,) = config.model.mixers.values()
    module = MODULES[mixer.kind](config.model, mixer, out_std=1.0, mesh=Mesh.alone())
    state = state_after(module, config.train.micro_batch_size, position, within_documents=within)
    found = sum(tensor.nbytes for name, tensor in state.named().items() if BOUNDARY not in name)
    assert carried_bytes(config, mixer, position) == found


DOCUMENTS = "model.within_documents=true"


@pytest.mark.parametrize(
    ("overrides", "chunks"),
    [
        (["train.segments=2", "parallel.cp=2", DOCUMENTS], 3),
        (["train.segments=4", DOCUMENTS, "model.mixers.hope.projection_chunk_size=32"], 3 * 2),
        (["train.segments=4"], 0),
        (["train.segments=4", *OTHERS["mag"]], 0),
        (["parallel.cp=2", *OTHERS["mag"]], 1),
        (["train.segments=4", DOCUMENTS, *MIXERS["attention"]], 0),
    ],
)
def test_half_a_chunk_of_each_piece_is_run_again(overrides: list[str], chunks: int):
    """Where documents go on, and on ranks where chunks count persistent tokens."""
    size = [] if MIXERS["attention"][0] in overrides else ["model.mixers.hope.chunk_size=16"]
    config = load_recipe("debug", [*overrides, *size]).config
    (mixer,) = config.model.mixers.values()
    found = chunks_rerun(config, Layout(cp=config.parallel.cp), mixer)
    assert found * config.train.seq_len == chunks * 16 / 2


def test_keys_and_values_are_kept_beside_what_kernels_pack():
    overrides = ["train.segments=4", "train.micro_batch_size=1", "train.device=cuda", *OTHERS["mag"]]
    wide, narrow = (load_recipe("debug", [*overrides, f"{HOPE}.window={seen}"]).config for seen in ("null", 1))
    more = kept_between_pieces(wide, Layout(), [0]) - kept_between_pieces(narrow, Layout(), [0])
    places = (place * wide.train.seq_len // 4 for place in (1, 2, 3))
    assert more == 1.5 * sum(2 * FP32 * wide.model.d_model * (place - 1) for place in places)


def test_kernels_hand_on_a_far_memory_and_the_last_inputs_beside_what_they_pack():
    overrides = ["train.segments=4", "train.micro_batch_size=1", "train.device=cuda"]

    def held(*more: str) -> tuple[int, float, float]:
        config = load_recipe("hope_1.3b", [*overrides, *more]).config
        (mixer,) = config.model.mixers.values()
        blocks = [0, 1]
        kept, again = (count(config, Layout(), blocks) for count in (kept_between_pieces, made_again))
        return carried_bytes(config, mixer, 1024), kept, again

    carried, kept, again = held()
    for setting in ("model.mixers.hope.far={chunk_size: 512}", "model.mixers.hope.conv_width=8"):
        more, more_kept, more_again = held(setting)
        assert more_kept - kept == pytest.approx(2 * 1.5 * 3 * (more - carried)), setting
        assert more_again - again == pytest.approx(2 * 1.5 * (more - carried)), setting
