"""With copied weights the layers equal those of transformers: Mamba-2, and Qwen3-Next's Gated DeltaNet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from hopescale.config.schema import ModelConfig
from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.models.linear_attention import LinearAttention
from tests.support.linear_attention import MAMBA2, make_mixer

WIDTH, HEADS, DIM, OUT, BATCH = 16, 4, 6, 8, 2


def rows_of_mamba2(peer: nn.Linear | nn.Conv1d, groups: int) -> list[Tensor]:
    """Return a Mamba-2 map's outputs in our order: of each group C, B, x and, from the in-projection, z and dt."""
    values, keys = HEADS * OUT, groups * DIM
    names = ["x", "B", "C"] if isinstance(peer, nn.Conv1d) else ["z", "x", "B", "C", "dt"]
    sizes = {"z": values, "x": values, "B": keys, "C": keys, "dt": HEADS}

    def in_our_order(tensor: Tensor) -> Tensor:
        parts = dict(zip(names, tensor.split([sizes[name] for name in names]), strict=True))
        order = [name for name in ("C", "B", "x", "z", "dt") if name in parts]
        return torch.cat([parts[name].chunk(groups)[group] for group in range(groups) for name in order])

    return [in_our_order(tensor) for tensor in peer.parameters()]


def mamba2(groups: int) -> tuple[LinearAttention, nn.Module, Callable[[], list[tuple[str, Tensor]]]]:
    """Return our mixer, theirs, and what lists our parameters by name with the values of theirs."""
    peer = Mamba2Mixer(
        Mamba2Config(
            hidden_size=WIDTH,
            num_heads=HEADS,
            head_dim=OUT,
            expand=HEADS * OUT // WIDTH,
            state_size=DIM,
            n_groups=groups,
            chunk_size=8,
            layer_norm_epsilon=1e-6,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    settings = {**MAMBA2, "key_groups": groups, "key_dim": DIM, "value_dim": OUT, "chunk_size": 16}
    ours = make_mixer(LinearAttentionConfig(**settings), model=ModelConfig(d_model=WIDTH, num_heads=HEADS))

    def values() -> list[tuple[str, Tensor]]:
        weight, bias = rows_of_mamba2(peer.conv1d, groups)
        return [
            ("in_proj.weight", rows_of_mamba2(peer.in_proj, groups)[0]),
            ("conv.weight", weight[:, 0]),
            ("conv.bias", bias),
            ("gates.A_log", peer.A_log),
            ("gates.dt_bias", peer.dt_bias),
            ("gates.D", peer.D),
            ("norm.weight", peer.norm.weight.view(groups, -1)),
            ("out_proj.weight", peer.out_proj.weight),
        ]

    return ours, peer, values


def qwen3_next(groups: int) -> tuple[LinearAttention, nn.Module, Callable[[], list[tuple[str, Tensor]]]]:
    """Return the same for Gated DeltaNet."""
    peer = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_key_heads=groups,
            linear_num_value_heads=HEADS,
            linear_key_head_dim=DIM,
            linear_value_head_dim=OUT,
            rms_norm_eps=1e-6,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        layer_idx=0,
    )
    settings = {"key_groups": groups, "key_dim": DIM, "value_dim": OUT, "chunk_size": 16}
    ours = make_mixer(LinearAttentionConfig(**settings), model=ModelConfig(d_model=WIDTH, num_heads=HEADS))

    def values() -> list[tuple[str, Tensor]]:
        numbers = peer.in_proj_ba.weight.view(groups, 2, HEADS // groups, WIDTH).flip(1)  # theirs: b, a
        rows = torch.cat([peer.in_proj_qkvz.weight.view(groups, -1, WIDTH), numbers.flatten(1, 2)], dim=1)
        filters = peer.conv1d.weight[:, 0].split([groups * DIM, groups * DIM, HEADS * OUT])
        filters = torch.cat([part.view(groups, -1, part.shape[-1]) for part in filters], dim=1)
        return [
            ("in_proj.weight", rows.flatten(0, 1)),
            ("conv.weight", filters.flatten(0, 1)),
            ("gates.A_log", peer.A_log),
            ("gates.dt_bias", peer.dt_bias),
            ("norm.weight", peer.norm.weight),
            ("out_proj.weight", peer.out_proj.weight),
        ]

    return ours, peer, values


@pytest.mark.parametrize("tokens", [1, 17, 63])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("make", [mamba2, qwen3_next])
def test_outputs_and_gradients_equal_those_of_transformers(make: Callable, groups: int, tokens: int):
    g = torch.Generator().manual_seed(groups)
    ours, peer, values = make(groups)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g) + (name in ("norm.weight", "D")))
        copied = dict(values())
        assert copied.keys() == dict(ours.named_parameters()).keys()
        ours.float().load_state_dict(copied)
    x = torch.randn(BATCH, tokens, WIDTH, generator=g)
    weights = torch.randn(BATCH, tokens, WIDTH, generator=g)

    y, wanted = ours(x.transpose(0, 1))[0].transpose(0, 1), peer(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))
    (y * weights).sum().backward()
    # Of each of our parameters, the gradient that theirs gets through the copy.
    given = torch.autograd.grad((wanted * weights).sum(), list(peer.parameters()), allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(peer.parameters(), given, strict=True):
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        for name, gradient in values():
            found = dict(ours.named_parameters())[name].grad
            # A norm per head leaves of a head's factor D no more than rounding, where a group has one head.
            torch.testing.assert_close(found, gradient, rtol=0, atol=2e-4 * float(gradient.abs().max()) + 1e-5)
