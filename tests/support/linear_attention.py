"""Published layers with a linear memory as settings, and each layer as its equations say, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.config.schema import ModelConfig
from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.models.init import initialize
from hopescale.models.linear_attention import LinearAttention
from hopescale.parallel.mesh import Mesh

MODEL = ModelConfig(d_model=12, num_heads=4, head_dim=6)

RETNET = {
    "conv_width": None,
    "key_norm": "none",
    "rotary": True,
    "decay": "fixed",
    "write": "one",
    "erase": False,
    "norm_weight": "none",
}
MAMBA2 = {
    "conv_bias": True,
    "key_norm": "none",
    "query_scale": False,
    "write": "step",
    "erase": False,
    "skip": True,
    "output_gate": "before_norm",
    "norm": "group",
    "norm_weight": "own",
}
SMALL = {"key_dim": 6, "value_dim": 10, "chunk_size": 16}
SYSTEMS = {
    "RetNet": LinearAttentionConfig(**RETNET, **SMALL),
    "DeltaNet": LinearAttentionConfig(decay="none", output_gate="none", **SMALL),
    "Gated DeltaNet": LinearAttentionConfig(key_groups=2, **SMALL),
    "Mamba-2": LinearAttentionConfig(key_groups=2, **MAMBA2, **SMALL),
    "Mamba-2, one group": LinearAttentionConfig(key_groups=1, **MAMBA2, **SMALL),
    "linear attention": LinearAttentionConfig(
        decay="none", write="one", erase=False, output_gate="none", norm_weight="own", num_heads=2, chunk_size=16
    ),
}


def make_mixer(config: LinearAttentionConfig, mesh: Mesh | None = None, model: ModelConfig = MODEL) -> LinearAttention:
    """Return a mixer in float64, away from its structured start, so that every term of the equations matters."""
    mesh = mesh or Mesh.alone()
    mixer = LinearAttention(model, config, out_std=0.3, mesh=mesh)
    initialize(mixer, 0, mesh)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            whole = parameter.spec.whole_shape(parameter.shape, mesh.tp_group.size())
            noise = 0.3 * torch.randn(whole, generator=torch.Generator().manual_seed(len(name)))
            if parameter.spec.partition_dim is not None:
                noise = noise.chunk(mesh.tp_group.size(), parameter.spec.partition_dim)[mesh.tp_group.rank()]
            parameter += noise
    return mixer.double()


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def rms(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + MODEL.norm_eps)


def rotated(x: Tensor, t: int) -> Tensor:
    """Turn the halves of `[..., D]` as pairs by the angles of position `t`, as complex numbers."""
    half = x.shape[-1] // 2
    turn = torch.polar(torch.ones(half, dtype=x.dtype), t * 10_000.0 ** (-torch.arange(half, dtype=x.dtype) / half))
    product = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([product.real, product.imag], -1)


def naive_layer(mixer: LinearAttention, x: Tensor) -> Tensor:
    """Mix `[T, B, N]` as the papers write it, with the names of the layer's parameters."""
    config, sizes, weights = mixer.config, mixer.sizes, dict(mixer.named_parameters())
    groups, shared, dim, out = sizes.groups, sizes.shared_by, sizes.key_dim, sizes.value_dim
    rows = weights["in_proj.weight"].view(groups, sizes.group_inputs, -1)
    values = shared * out
    streams = 2 * dim + values
    after_gate = streams + (values if config.output_gate != "none" else 0)
    memory = x.new_zeros(x.shape[1], groups * shared, dim, out)
    past, ys = [], []
    for t, token in enumerate(x):
        past.append(torch.einsum("bn,gin->bgi", token, rows))
        now = past[-1]
        mixed = now[..., :streams]
        if config.conv_width:
            filters = weights["conv.weight"].view(groups, streams, -1)
            mixed = sum(
                past[t - age][..., :streams] * filters[..., config.conv_width - 1 - age]
                for age in range(min(config.conv_width, t + 1))
            )
            mixed = mixed + weights["conv.bias"].view(groups, streams) if config.conv_bias else mixed
            mixed = mixed * torch.sigmoid(mixed)
        q, k, v = mixed[..., :dim], mixed[..., dim : 2 * dim], mixed[..., 2 * dim :]
        if config.key_norm == "l2":
            q, k = unit(q), unit(k)
        if config.query_scale:
            q = q / dim**0.5
        if config.rotary:
            q, k = rotated(q, t), rotated(k, t)
        q, k = (one.repeat_interleave(shared, 1) for one in (q, k))  # [B, H, D]
        v = v.reshape(-1, groups * shared, out)
        numbers = now[..., after_gate:]
        alpha, eta = torch.ones_like(v[..., 0]), torch.ones_like(v[..., 0])
        if config.decay == "fixed":
            alpha = (1 - 2.0 ** (-5 - torch.arange(groups * shared, dtype=x.dtype))).expand_as(alpha)
        if config.decay == "input":
            step = F.softplus(numbers[..., :shared].flatten(1) + weights["gates.dt_bias"])
            alpha = torch.exp(-torch.exp(weights["gates.A_log"]) * step)
            eta = step if config.write == "step" else eta
        if config.write == "sigmoid":
            eta = torch.sigmoid(numbers[..., -shared:].flatten(1))
        if config.erase:
            eye = torch.eye(dim, dtype=x.dtype)
            memory = (eye - eta[..., None, None] * k[..., :, None] * k[..., None, :]) @ memory
        memory = alpha[..., None, None] * memory + (eta[..., None] * k)[..., None] * v[..., None, :]
        y = torch.einsum("bhdo,bhd->bho", memory, q)
        if config.skip:
            y = y + weights["gates.D"][:, None] * v
        z = now[..., streams:after_gate].reshape(-1, groups * shared, out) if config.output_gate != "none" else None
        if config.output_gate == "before_norm":
            y = y * F.silu(z)
        y = rms(y) if config.norm == "head" else rms(y.reshape(-1, groups, values)).reshape(y.shape)
        if config.norm_weight != "none":
            weight = weights["norm.weight"]
            y = y * (weight if config.norm_weight == "shared" else weight.view(groups * shared, out))
        if config.output_gate == "after_norm":
            y = y * F.silu(z)
        ys.append(y.flatten(1) @ weights["out_proj.weight"].T)
    return torch.stack(ys)
