"""What is counted of test-time training is what the module has, executes and keeps, whatever its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hopescale.config.layout import Layout
from hopescale.config.schema import TrainConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.cost.micro_batch import MicroBatch
from hopescale.cost.parameter import ParameterShape
from hopescale.cost.ttt import (
    ttt_activations,
    ttt_maps,
    ttt_mixing,
    ttt_parameters,
    ttt_state,
)
from hopescale.models.init import initialize
from hopescale.models.ttt import Ttt
from hopescale.parallel.mesh import Mesh
from tests.support.ttt import MODEL, SYSTEMS

WIDE = replace(MODEL, d_model=48, head_dim=20, num_heads=2)
CASES = SYSTEMS | {"gate alone": TttConfig(conv_width=None), "convolution alone": TttConfig(gate=False)}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def make(config: TttConfig) -> Ttt:
    mixer = Ttt(WIDE, config, out_std=0.1, mesh=Mesh.alone())
    initialize(mixer, 0, Mesh.alone())
    return mixer


@every_case
def test_parameters_and_states_are_the_modules(config: TttConfig):
    mixer = make(config)
    found = [
        ParameterShape(name, tuple(p.shape), p.spec.partition_dim, p.spec.keep_fp32)
        for name, p in mixer.named_parameters()
    ]
    assert list(ttt_parameters(WIDE, config)) == found
    state = mixer(torch.randn(9, 1, WIDE.d_model))[1]
    entries = {name: tensor.numel() for name, tensor in state.named().items()}
    assert ttt_state(WIDE, config) == entries


def executed(config: TttConfig, tokens: int) -> float:
    x = torch.randn(tokens, 2, WIDE.d_model, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        make(config)(x)[0].sum().backward()
    return counter.get_total_flops() / 2


def of_more_tokens(count: Callable[[int], float]) -> float:
    """Difference that more tokens make: what the first chunk lacks, and the last, is the same in both."""
    return count(160) - count(96)


@every_case
def test_flops_are_what_torch_executes(config: TttConfig):
    def counted(tokens: int) -> float:
        per_token = ttt_maps(WIDE, config) + ttt_mixing(WIDE, config, tokens)
        return tokens * per_token.total

    wanted = of_more_tokens(lambda tokens: executed(config, tokens))
    assert of_more_tokens(counted) == pytest.approx(wanted, rel=1e-6)
    assert counted(75) == pytest.approx(executed(config, 75), rel=0.07)


def kept_bytes(config: TttConfig, tokens: int, batch: int, dtype: torch.dtype) -> float:
    """Bytes of all tensors that autograd holds after a forward pass, weights and the input left out."""
    mixer = make(config)
    for parameter in mixer.parameters():
        if not parameter.spec.keep_fp32:
            parameter.data = parameter.data.to(dtype)
    x = torch.randn(tokens, batch, WIDE.d_model, dtype=dtype, requires_grad=True)
    given, held = {p.untyped_storage().data_ptr() for p in [*mixer.parameters(), x]}, {}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = mixer(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in given)


@every_case
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept(config: TttConfig, precision: str):
    train = replace(TrainConfig(), seq_len=160, micro_batch_size=2, precision=precision)
    counted = ttt_activations(WIDE, config, MicroBatch.of(train, Layout()))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert counted.kept + counted.states == pytest.approx(kept_bytes(config, 160, 2, dtype), rel=0.02)
