"""Titans' compositions as settings, and each as its equations say, token by token (arXiv 2501.00663, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.config.schema import ModelConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.models.init import initialize
from hopescale.models.titans import Titans
from hopescale.parallel.mesh import Mesh
from tests.support.linear_attention import rotated

MODEL = ModelConfig(d_model=12, num_heads=4, head_dim=6)
SMALL = {"persistent_tokens": 3, "chunk_size": 8, "memory_dim": 5}
SYSTEMS = {
    "MAC": TitansConfig(**SMALL),
    "MAC, linear": TitansConfig(persistent_tokens=1, chunk_size=4, memory="linear", objective="dot", conv_width=None),
    "MAG": TitansConfig(composition="mag", window=7, **SMALL),
    "MAG, all in sight": TitansConfig(composition="mag", momentum_write="averaged", **SMALL),
    "MAL": TitansConfig(composition="mal", window=7, gate=True, **SMALL),
    "MAL, all in sight": TitansConfig(composition="mal", conv_width=None, **SMALL),
}


def make_mixer(config: TitansConfig, mesh: Mesh | None = None, model: ModelConfig = MODEL) -> Titans:
    """Return a mixer in float64, away from its structured start."""
    mesh = mesh or Mesh.alone()
    mixer = Titans(model, config, out_std=0.3, mesh=mesh)
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


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


class NaiveMemory:
    """The neural memory: it is given tokens `[B, N]` one by one, and answers each after it was written `[B, H, D]`."""

    def __init__(self, mixer: Titans, batch: int):
        self.part, self.config, self.past, self.read = mixer.memory, mixer.config, [], 0
        bank = mixer.memory.banks["memory"].mem
        names = ("w",) if self.config.memory == "linear" else ("w2", "w1")
        self.now = [getattr(bank, name).expand(batch, -1, -1, -1) for name in names]
        self.push = [torch.zeros_like(w) for w in self.now]
        self.start = self.now

    def recall(self, weights: list[Tensor], z: Tensor) -> Tensor:
        """Return `M(z)` `[B, H, D]` with these weights."""
        y = torch.einsum("bhij,bhj->bhi", weights[0], z)
        return y if len(weights) == 1 else z + torch.einsum("bhij,bhj->bhi", weights[1], F.silu(y))

    def streams(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project and convolve a token: key, value, query, and the gate of the output if there is one."""
        part, heads, dim = self.part, self.part.heads, self.part.head_dim
        mixed = torch.einsum("bn,hsdn->bhsd", x, part.in_proj.weight.view(heads, -1, dim, x.shape[-1]))
        self.past.append(mixed[:, :, :3])
        streams = mixed[:, :, :3]
        if part.conv is not None:
            filters = part.conv["weight"].view(heads, 3, dim, -1)
            taps = zip(reversed(self.past), filters.flip(-1).unbind(-1), strict=False)
            streams = F.silu(sum(token * taken for token, taken in taps))
        k, v, q = streams.unbind(2)
        return unit(k), v, unit(q), *mixed[:, :, 3:].unbind(2)

    def step(self, x: Tensor) -> Tensor:
        """Write a token (Eq. 13, 14), and read."""
        if self.read % self.config.chunk_size == 0:
            self.start = self.now
        self.read += 1
        k, v, q, *gate = self.streams(x)
        eta, alpha, mu = (
            torch.sigmoid(each.bias + (k * each.weight).sum(-1))[..., None, None] for each in self.part.gates.values()
        )
        inner = [w.clone() for w in self.start]
        answer = self.recall(inner, k)
        error = -v if self.config.objective == "dot" else answer - v
        surprise = torch.autograd.grad(answer, inner, error, create_graph=True)
        entering = 1 if self.config.momentum_write == "whole" else 1 - mu
        self.push = [mu * s - entering * eta * g for s, g in zip(self.push, surprise, strict=True)]
        self.now = [alpha * w + s for w, s in zip(self.now, self.push, strict=True)]
        y = normed(self.recall(self.now, q), self.part.norm.weight)
        return y * F.silu(gate[0]) if gate else y


class NaiveAttention:
    """Attention to a list of keys and values, each of one token `[B, H, D]`."""

    def __init__(self, mixer: Titans):
        self.part = mixer.attention

    def streams(self, x: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Project a token `[B, N]`: query, key and value at a position."""
        weight = self.part.qkv_proj.weight.view(self.part.kv_heads, 3, self.part.head_dim, -1)
        q, k, v = torch.einsum("bn,hsdn->sbhd", x, weight)
        return rotated(q, place), rotated(k, place), v

    def answer(self, q: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the softmax of products, times values."""
        scores = torch.stack([(q * k).sum(-1) for k, _ in seen]) / self.part.head_dim**0.5
        return sum(weight[..., None] * v for weight, (_, v) in zip(scores.softmax(0), seen, strict=True))


def gated(mixer: Titans, seen: Tensor, remembered: Tensor) -> Tensor:
    return normed(seen, mixer.norm.weight) * torch.sigmoid(remembered)


def naive_layer(mixer: Titans, x: Tensor) -> Tensor:
    """Mix `[T, B, N]` as the paper writes it, with the names of the layer's parameters."""
    layer = {"mac": naive_context, "mag": naive_gate, "mal": naive_layers}[mixer.config.composition]
    persistent = [p.expand(x.shape[1], -1) for p in mixer.persistent]
    return torch.stack([y.flatten(1) for y in layer(mixer, list(x), persistent)]) @ mixer.out_proj.weight.T


def naive_gate(mixer: Titans, x: list[Tensor], persistent: list[Tensor]) -> list[Tensor]:
    memory, attention, results = NaiveMemory(mixer, len(x[0])), NaiveAttention(mixer), []
    prefix = [attention.streams(p, n)[1:] for n, p in enumerate(persistent)]
    for p in persistent:
        memory.step(p)
    cache = []
    for n, token in enumerate(x):
        q, *own = attention.streams(token, len(persistent) + n)
        cache.append(own)
        window = cache[-mixer.config.window :] if mixer.config.window else cache
        results.append(gated(mixer, attention.answer(q, prefix + window), memory.step(token)))
    return results


def naive_layers(mixer: Titans, x: list[Tensor], persistent: list[Tensor]) -> list[Tensor]:
    memory, attention, results, cache = NaiveMemory(mixer, len(x[0])), NaiveAttention(mixer), [], []
    for n, token in enumerate(persistent + x):
        q, *own = attention.streams(memory.step(token).flatten(1) @ mixer.inner_proj.weight.T, n)
        cache.append(own)
        results.append(attention.answer(q, cache[-mixer.config.window :] if mixer.config.window else cache))
    return results[len(persistent) :]


def naive_context(mixer: Titans, x: list[Tensor], persistent: list[Tensor]) -> list[Tensor]:
    memory, attention, results = NaiveMemory(mixer, len(x[0])), NaiveAttention(mixer), []
    prefix = [attention.streams(p, n)[1:] for n, p in enumerate(persistent)]
    size, count, context = mixer.config.chunk_size, len(persistent), mixer.context
    for n, token in enumerate(x):
        if n % size == 0:
            known, segment, place = memory.now, [], count
        query = (token @ context.query_proj.weight.T).unflatten(-1, (context.heads, context.dim))
        retrieved = normed(memory.recall(known, unit(query)), context.norm.weight)
        retrieved = retrieved.flatten(1) @ context.out_proj.weight.T
        q, *own = attention.streams(token, place + size)
        segment += [attention.streams(retrieved, place)[1:], own]
        place += 1
        seen = attention.answer(q, prefix + segment)
        results.append(gated(mixer, seen, memory.step(seen.flatten(1) @ mixer.inner_proj.weight.T)))
    return results
