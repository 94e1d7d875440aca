"""What a forward pass keeps for the backward pass is what the plan says, whatever the mixer's settings."""

from __future__ import annotations

import pytest
import torch

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.model_shape import mixer_of_block, padded_vocab_size
from hopescale.cost.device_memory import block_activations, head_bytes
from hopescale.cost.hardware import trained_on
from hopescale.cost.micro_batch import MicroBatch
from hopescale.models import Model
from hopescale.parallel.layers import cross_entropy_sum
from tests.support.mixers import MIXERS

SMALL = (
    "model.d_model=48",
    "model.head_dim=24",
    "model.mixers.hope.chunk_size=16",
    "model.vocab_size=100",
    "train.seq_len=96",
    "train.micro_batch_size=2",
)
CASES = MIXERS | {
    "gate, no convolution": ["model.mixers.hope={gate: true, conv_width: null, error_cap: 1.0}"],
    "linear, whole writes": ["model.mixers.hope={memory: linear, momentum_write: whole}"],
    "static values, whole writes": [
        "model.mixers.hope={memory: linear, adaptive: [], targets: value, objective: dot, momentum_write: whole}"
    ],
    "independent levels": ["model.mixers.hope.kind=attention", "model.cms.variant=independent"],
}


def kept_bytes(overrides: list[str], recompute: str) -> float:
    """Bytes of all tensors that autograd holds after a forward pass, weights left out."""
    config = load_recipe("debug", [*SMALL, *overrides]).config
    model = Model(config.model, recompute=recompute)
    if config.train.precision == "bf16":
        model.to_precision(torch.bfloat16)
    tokens = torch.randint(100, (config.train.micro_batch_size, config.train.seq_len))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy_sum(model(tokens)[0], tokens, model.mesh)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)


def planned_bytes(overrides: list[str], recompute: str) -> float:
    config = load_recipe("debug", [*SMALL, *overrides]).config
    model, micro = config.model, MicroBatch.of(config.train, Layout())
    blocks = [block_activations(model, mixer_of_block(model, i), micro, recompute) for i in range(model.num_layers)]
    loss = 4 * micro.tokens * padded_vocab_size(model)
    return sum(block.kept + block.states for block in blocks) + head_bytes(model, micro) + loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "chunks", "reverse"])
@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_what_is_kept(overrides: list[str], recompute: str, precision: str):
    overrides = [*overrides, f"train.precision={precision}"]
    assert planned_bytes(overrides, recompute) == pytest.approx(kept_bytes(overrides, recompute), rel=0.05)


def test_states_of_a_large_layer_take_little():
    """Of 8 sequences of 4,096 tokens at `d_model` 2048, with MLP memories in heads of 64, on a GPU."""
    overrides = ["model.num_heads=32", "train.seq_len=4096", "train.micro_batch_size=8"]
    config = trained_on(load_recipe("hope_1.3b", overrides).config, "H100")
    micro = MicroBatch.of(config.train, Layout())
    states = block_activations(config.model, mixer_of_block(config.model, 0), micro, "chunks").states
    assert 0 < states <= 1.5e9
