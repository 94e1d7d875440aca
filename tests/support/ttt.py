"""Test-time training's published layers as settings, and the layer as its equations say."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.models.init import initialize
from hopescale.models.ttt import Ttt
from hopescale.ops.ttt import TttMemory, TttState, TttStreams, TttWeights, ttt_naive
from hopescale.parallel.mesh import Mesh
from tests.support.linear_attention import rotated

MODEL = ModelConfig(d_model=12, num_heads=4, head_dim=6)
SYSTEMS = {
    "TTT-Linear": TttConfig(),
    "TTT-MLP": TttConfig(memory="mlp", rate=0.1),
    "TTT-Linear, Transformer backbone": TttConfig(conv_width=None, gate=False),
    "TTT-MLP, narrow": TttConfig(memory="mlp", memory_dim=5, chunk_size=4, conv_width=3),
}


def make_mixer(config: TttConfig, mesh: Mesh | None = None, model: ModelConfig = MODEL) -> Ttt:
    """Return a mixer in float64, away from its structured start."""
    mesh = mesh or Mesh.alone()
    mixer = Ttt(model, config, out_std=0.3, mesh=mesh)
    initialize(mixer, 0, mesh)
    ranks, rank = mesh.tp_group.size(), mesh.tp_group.rank()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            noise = torch.randn(
                parameter.spec.whole_shape(parameter.shape, ranks), generator=torch.Generator().manual_seed(len(name))
            )
            dim = parameter.spec.partition_dim
            parameter += 0.3 * (noise if dim is None else noise.chunk(ranks, dim)[rank])
    return mixer.double()


def naive_layer(mixer: Ttt, x: Tensor) -> Tensor:
    """Mix `[T, B, N]`, all projections and convolutions written out, the memories token by token."""
    config, heads, dim, p = mixer.config, mixer.heads, mixer.head_dim, dict(mixer.named_parameters())
    rows = p["in_proj.weight"].view(heads, -1, x.shape[-1])
    mixed = torch.einsum("tbn,hin->bhti", x, rows)
    parts = list(mixed[..., :-1].split(dim, -1))
    if config.conv_width:
        filters = p["conv.weight"].view(heads, 2, dim, -1)
        shared, *parts = parts
        padded = torch.cat([shared.new_zeros(*shared.shape[:2], config.conv_width - 1, dim), shared], 2)
        windows = padded.unfold(2, config.conv_width, 1)  # [B, H, T, D, W]
        convolved = torch.einsum("bhtdw,hsdw->sbhtd", windows, filters)
        bias = p["conv.bias"].view(heads, 2, 1, dim)
        parts = [convolved[0] + bias[:, 0], convolved[1] + bias[:, 1], *parts]
    q, k, v = parts[:3]
    q, k = (torch.stack([rotated(one[:, :, t], t % config.chunk_size) for t in range(len(x))], 2) for one in (q, k))
    rate = torch.sigmoid(mixed[..., -1] + p["gates.rate"][:, None])
    layers = [
        (
            p[f"banks.w{number}"].mT.expand(x.shape[1], -1, -1, -1),
            p[f"gates.b{number}"][:, None].expand(x.shape[1], -1, -1, -1),
        )
        for number in range(1, len(mixer.banks) + 1)
    ]
    weights = TttWeights(*[tensor for layer in layers for tensor in layer], *[None] * (4 - 2 * len(layers)))
    step = torch.clamp(1 / torch.arange(1.0, config.chunk_size + 1, dtype=x.dtype) + p["gates.place"], min=0)
    memory = TttMemory(config.rate / dim * step, p["gates.gamma"][:, None], p["gates.beta"][:, None], 1e-6)
    y, _ = ttt_naive(TttStreams(q, k, v, rate), TttState(weights, weights.map(torch.zeros_like)), memory)
    y = y.permute(2, 0, 1, 3).flatten(2)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-6)
    y = y * p["norm.weight"].flatten() + p["norm.bias"].flatten()
    if config.gate:
        y = torch.nn.functional.gelu(parts[3], approximate="tanh").permute(2, 0, 1, 3).flatten(2) * y
    return y @ p["out_proj.weight"].T
