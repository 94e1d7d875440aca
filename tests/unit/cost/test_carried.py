"""What a model hands on between pieces of sequences is what the plan counts."""

from __future__ import annotations

import pytest

from hopescale.config.load import load_recipe
from hopescale.cost.carried import carried_bytes
from hopescale.models.block import MIXERS as MODULES
from hopescale.models.handover import BOUNDARY, state_after
from hopescale.parallel.mesh import Mesh
from tests.support.mixers import MIXERS

OTHERS = {
    "linear attention": ["model.mixers.hope.kind=linear_attention"],
    "ttt": ["model.mixers.hope.kind=ttt", "model.mixers.hope={memory: mlp}"],
    "no convolution": ["model.mixers.hope.conv_width=null"],
}
NAMES = ("hope", "linear", "narrow memories", "no momentum", "two banks", "far memory", "grouped attention", "mac")


@pytest.mark.parametrize("position", [32, 96])
@pytest.mark.parametrize("overrides", [*(MIXERS[name] for name in NAMES), MIXERS["sliding window"], *OTHERS.values()])
def test_the_bytes_of_a_state(overrides: list[str], position: int):
    config = load_recipe("debug", [*overrides, "train.micro_batch_size=3"]).config
    (mixer,) = config.model.mixers.values()
    module = MODULES[mixer.kind](config.model, mixer, out_std=1.0, mesh=Mesh.alone())
    state = state_after(module, config.train.micro_batch_size, position)
    found = sum(tensor.nbytes for name, tensor in state.named().items() if BOUNDARY not in name)
    assert carried_bytes(config, mixer, position) == found
