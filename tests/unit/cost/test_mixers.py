"""What is counted of a mixer alone is what its module has, executes and keeps, whatever its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hopescale.config.layout import Layout
from hopescale.config.schema import LinearAttentionConfig, MixerConfig, TrainConfig, TttConfig
from hopescale.cost.linear_attention import linear_attention_state
from hopescale.cost.micro_batch import MicroBatch
from hopescale.cost.mixers import COSTS
from hopescale.cost.parameter import ParameterShape
from hopescale.cost.ttt import ttt_state
from hopescale.models.block import MIXERS
from hopescale.models.init import initialize
from hopescale.parallel.mesh import Mesh
from tests.support import linear_attention, ttt

aten = torch.ops.aten
WIDE = {
    "linear_attention": replace(linear_attention.MODEL, d_model=48),
    "ttt": replace(ttt.MODEL, d_model=48, head_dim=20, num_heads=2),
}
STATES = {"linear_attention": linear_attention_state, "ttt": ttt_state}
SIZES = {"key_dim": 24, "value_dim": 20, "chunk_size": 16}
CASES: dict[str, MixerConfig] = {
    **{name: replace(config, **SIZES) for name, config in linear_attention.SYSTEMS.items()},
    "no convolution": LinearAttentionConfig(conv_width=None, **SIZES),
    "erase by 1": LinearAttentionConfig(write="one", decay="none", norm_weight="none", **SIZES),
    "skip and erase": LinearAttentionConfig(skip=True, decay="fixed", output_gate="before_norm", **SIZES),
    "own heads": LinearAttentionConfig(num_heads=6, key_groups=3, norm="group", norm_weight="own", **SIZES),
    **ttt.SYSTEMS,
    "gate alone": TttConfig(conv_width=None),
    "convolution alone": TttConfig(gate=False),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def make(config: MixerConfig) -> nn.Module:
    mixer = MIXERS[config.kind](WIDE[config.kind], config, out_std=0.1, mesh=Mesh.alone())
    initialize(mixer, 0, Mesh.alone())
    return mixer


@every_case
def test_parameters_and_states_are_the_modules(config: MixerConfig):
    mixer, model = make(config), WIDE[config.kind]
    found = [
        ParameterShape(name, tuple(p.shape), p.spec.partition_dim, p.spec.keep_fp32, parts=p.spec.parts)
        for name, p in mixer.named_parameters()
    ]
    assert list(COSTS[config.kind].parameters(model, config)) == found
    state = mixer(torch.randn(9, 1, model.d_model))[1]
    entries = {name: tensor.numel() for name, tensor in state.named().items()}
    assert STATES[config.kind](model, config) == entries


def executed(config: MixerConfig, tokens: int) -> float:
    counts = {aten.linalg_solve_triangular: lambda a, b, **_: a[-1] * math.prod(b)}
    x = torch.randn(tokens, 2, WIDE[config.kind].d_model, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        make(config)(x)[0].sum().backward()
    return counter.get_total_flops() / 2


def of_more_tokens(count: Callable[[int], float]) -> float:
    """Difference that more tokens make: what the first chunk lacks, and the last, is the same in both."""
    return count(160) - count(96)


@every_case
def test_flops_are_what_torch_executes(config: MixerConfig):
    model, cost = WIDE[config.kind], COSTS[config.kind]

    def counted(tokens: int) -> float:
        per_token = cost.maps(model, config) + cost.mixing(model, config, tokens, None)
        return tokens * per_token.total

    wanted = of_more_tokens(lambda tokens: executed(config, tokens))
    assert of_more_tokens(counted) == pytest.approx(wanted, rel=1e-6)
    assert counted(75) == pytest.approx(executed(config, 75), rel=0.07)


def kept_bytes(config: MixerConfig, tokens: int, batch: int, dtype: torch.dtype) -> float:
    """Bytes of all tensors that autograd holds after a forward pass, weights and the input left out."""
    mixer = make(config)
    for parameter in mixer.parameters():
        if not parameter.spec.keep_fp32:
            parameter.data = parameter.data.to(dtype)
    x = torch.randn(tokens, batch, WIDE[config.kind].d_model, dtype=dtype, requires_grad=True)
    given, held = {p.untyped_storage().data_ptr() for p in [*mixer.parameters(), x]}, {}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = mixer(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in given)


@every_case
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept(config: MixerConfig, precision: str):
    train = replace(TrainConfig(), seq_len=160, micro_batch_size=2, precision=precision)
    counted = COSTS[config.kind].activations(WIDE[config.kind], config, MicroBatch.of(train, Layout()), "none")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert counted.kept + counted.states == pytest.approx(kept_bytes(config, 160, 2, dtype), rel=0.02)


@pytest.mark.parametrize("config", [CASES["Gated DeltaNet"], CASES["Mamba-2"]])
def test_ranks_share_what_is_kept(config: MixerConfig):
    train = replace(TrainConfig(), seq_len=160, micro_batch_size=2)
    model, count = WIDE[config.kind], COSTS[config.kind].activations
    whole, half = (count(model, config, MicroBatch.of(train, Layout(tp=tp)), "none") for tp in (1, 2))
    assert half.states == whole.states / 2
    assert half.kept == pytest.approx(whole.kept / 2, rel=0.1)
