"""The self-modifying mixer as its equations say, in a loop over tokens, and its switches."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.config.model_shape import normalizes_writes
from hopescale.config.schema import FarMemoryConfig
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.self_modifying import Memories, Streams, self_modifying_naive
from hopescale.ops.self_modifying.types import KEY_EPS

SWITCHES = {
    "default": {},
    "linear": {"memory": "linear"},
    "no momentum": {"momentum": False},
    "gradient descent": {"inner_rule": "gd"},
    "linear gradient descent": {"memory": "linear", "inner_rule": "gd", "momentum": False},
    "dot": {"objective": "dot"},
    "linear dot": {"memory": "linear", "objective": "dot"},
    "no retention": {"retention": False, "adaptive": ("k", "v", "eta")},
    "inclusive": {"read": "inclusive"},
    "boundary": {"read": "boundary"},
    "linear boundary": {"read": "boundary", "memory": "linear"},
    "static": {"adaptive": ()},
    "only gates": {"adaptive": ("eta", "alpha")},
    "only k": {"adaptive": ("k",)},
    "one gate": {"adaptive": ("eta",)},
    "query memory": {"query": "memory"},
    "value targets": {"adaptive": (), "targets": "value"},
    "linear value targets": {"adaptive": (), "targets": "value", "memory": "linear"},
    "static linear dot": {"adaptive": (), "memory": "linear", "objective": "dot"},
    "stored values": {"adaptive": (), "targets": "value", "memory": "linear", "objective": "dot"},
    "stored values, whole writes": {
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "objective": "dot",
        "momentum_write": "whole",
    },
    "DeltaNet": {
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "objective": "dot",
        "read": "inclusive",
        "momentum": False,
        "retention": False,
    },
    "TTT-Linear": {
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "inner_rule": "gd",
        "momentum": False,
        "retention": False,
    },
    "TTT-MLP": {"adaptive": (), "targets": "value", "inner_rule": "gd", "momentum": False, "retention": False},
    "Titans": {
        "adaptive": (),
        "targets": "value",
        "inner_rule": "gd",
        "read": "inclusive",
        "momentum_write": "whole",
        "normalize_writes": False,
    },
    "whole writes": {"momentum_write": "whole"},
    "linear, whole writes": {"memory": "linear", "momentum_write": "whole"},
    "error cap": {"error_cap": 0.3},
    "writes as printed": {"normalize_writes": False},
    "hidden width": {"memory_dim": 10},
    "large eta": {"eta_max": 2.0, "eta_init": 0.4},
    "gate": {"gate": True},
    "no conv": {"conv_width": None},
    "two chunk sizes": {"projection_chunk_size": 8},
    "two chunk sizes, linear": {"projection_chunk_size": 8, "memory": "linear"},
    "two chunk sizes, one gate": {"projection_chunk_size": 8, "adaptive": ("eta",)},
    "two chunk sizes, query memory": {"projection_chunk_size": 8, "query": "memory", "adaptive": ()},
    "token chunks": {"chunk_size": 1},
    "resets": {"reset_every": 8},
    "resets, two chunk sizes": {"reset_every": 8, "projection_chunk_size": 8},
    "far memory": {"reset_every": 8, "far": FarMemoryConfig(chunk_size=12, eta_init=0.1, alpha_init=0.9)},
    "far memory of Titans": {
        "adaptive": (),
        "targets": "value",
        "inner_rule": "gd",
        "retention": False,
        "far": FarMemoryConfig(chunk_size=8, eta_init=0.1),
    },
    "resets of stored values": {
        "reset_every": 8,
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "objective": "dot",
    },
}


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def naive_streams(mixer: SelfModifying, convolved: Tensor) -> Streams:
    """Inputs of keys, values and queries `[B, H, T, D]` and the logits of gates, of `[T, B, H, 3, D]`."""
    k, v, q = convolved.permute(3, 1, 2, 0, 4)
    k, v, q = unit(k), unit(v) if mixer.config.targets == "self" else v, unit(q)
    logits = dict.fromkeys(("eta", "alpha", "mu"))
    for name, gate in mixer.gates.items():
        if name not in logits:
            continue
        logits[name] = gate.bias[:, None].expand(k.shape[:-1])
        if gate.weight is not None:
            logits[name] = logits[name] + torch.einsum("bhtd,hd->bht", k, gate.weight)
    return Streams(k, v, q, **logits)


def naive_far(mixer: SelfModifying, streams: Streams) -> Tensor:
    """Answers of the far memory `[B, H, T, D]`, gradient by gradient (TNT, Eq. 5 and the first term of Eq. 7)."""
    config, first = mixer.config, list(mixer.banks["far"].mem.parameters())
    weights = [part.mT.expand(len(streams.k), *part.mT.shape) for part in first]
    gates = {}
    for name in ("far_eta", "far_alpha"):
        if name in mixer.gates:
            gate = mixer.gates[name]
            gates[name] = torch.sigmoid(torch.einsum("bhtd,hd->bht", streams.k, gate.weight) + gate.bias[:, None])

    def answer(layers: list[Tensor], z: Tensor) -> Tensor:
        if len(layers) == 1:
            return torch.einsum("bhd,bhdo->bho", z, layers[0])
        hidden = torch.nn.functional.silu(torch.einsum("bhd,bhde->bhe", z, layers[0]))
        return z + torch.einsum("bhe,bheo->bho", hidden, layers[1])

    rows = []
    for t in range(streams.k.shape[2]):
        if t % config.far.chunk_size == 0:
            boundary = weights
        rows.append(answer(boundary, streams.q[:, :, t]))
        k, v, eta = streams.k[:, :, t], streams.v[:, :, t], config.eta_max * gates["far_eta"][:, :, t]
        inner = [w.clone() for w in boundary]
        read, target = answer(inner, k), answer(boundary, v) if config.targets == "self" else v
        error = read - target if config.objective == "l2" else -target
        slopes = torch.autograd.grad(read, inner, grad_outputs=error, create_graph=True)
        if normalizes_writes(config):
            # A slope is its key times what is written under it, whose length the key's length amplifies.
            square, hidden = error.square().sum(-1) * k.square().sum(-1), torch.einsum("bhd,bhde->bhe", k, boundary[0])
            gains = [slopes[0].square().sum((-1, -2)) / square]
            gains.append(torch.nn.functional.silu(hidden).square().sum(-1) + KEY_EPS)
            slopes = [s / gain.clamp_min(1)[..., None, None] for s, gain in zip(slopes, gains, strict=True)]
        kept = gates["far_alpha"][:, :, t, None, None] if "far_alpha" in gates else 1.0
        weights = [kept * w - eta[..., None, None] * slope for w, slope in zip(weights, slopes, strict=True)]
    return torch.stack(rows, dim=2)


def naive_mixer(mixer: SelfModifying, x: Tensor) -> Tensor:
    """The whole layer, written out: projection, convolution, heads, norm, gate, projection."""
    (tokens, batch), heads, dim = x.shape[:2], mixer.heads, mixer.head_dim
    slices = 3 + mixer.config.gate
    weight = mixer.in_proj.weight.view(heads, slices, dim, -1)
    mixed = torch.einsum("tbn,hsdn->tbhsd", x, weight)
    if mixer.conv is not None:
        filters = mixer.conv["weight"].view(heads, 3, dim, -1)
        width = filters.shape[-1]
        rows = []
        for t in range(tokens):
            past = [t - width + 1 + i for i in range(width)]
            taps = [mixed[s, :, :, :3] * filters[..., i] for i, s in enumerate(past) if s >= 0]
            rows.append(torch.nn.functional.silu(sum(taps)))
        convolved = torch.stack(rows)
    else:
        convolved = mixed[:, :, :, :3]
    state = mixer.initial_state(batch).tensors
    streams = naive_streams(mixer, convolved)
    every = mixer.config.reset_every or tokens
    pieces = streams.split([min(every, tokens - begin) for begin in range(0, tokens, every)])
    memories = Memories(state.memory, state.projection)
    y = torch.cat([self_modifying_naive(piece, memories, mixer.spec).y for piece in pieces], dim=2)
    if mixer.config.far is not None:
        y = y + naive_far(mixer, streams)
    y = y.permute(2, 0, 1, 3)
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * mixer.norm.weight
    if mixer.config.gate:
        y = y * torch.nn.functional.silu(mixed[:, :, :, 3])
    return y.flatten(2) @ mixer.out_proj.weight.T
