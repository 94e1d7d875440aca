"""The self-modifying mixer as its equations say, in loops over sequences, heads and tokens, and its switches."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.config.schema import SelfModifyingConfig
from hopescale.models.self_modifying import SelfModifying

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
    "TTT-Linear": {
        "adaptive": (),
        "targets": "value",
        "memory": "linear",
        "inner_rule": "gd",
        "momentum": False,
        "retention": False,
    },
    "TTT-MLP": {"adaptive": (), "targets": "value", "inner_rule": "gd", "momentum": False, "retention": False},
    "Titans": {"adaptive": (), "targets": "value", "inner_rule": "gd"},
    "error cap": {"error_cap": 0.3},
    "hidden width": {"memory_dim": 10},
    "large eta": {"eta_max": 2.0, "eta_init": 0.4},
    "gate": {"gate": True},
    "no conv": {"conv_width": None},
    "two chunk sizes": {"projection_chunk_size": 8},
    "two chunk sizes, linear": {"projection_chunk_size": 8, "memory": "linear"},
    "two chunk sizes, one gate": {"projection_chunk_size": 8, "adaptive": ("eta",)},
    "two chunk sizes, query memory": {"projection_chunk_size": 8, "query": "memory", "adaptive": ()},
    "token chunks": {"chunk_size": 1},
}


def unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() + 1e-6)


class Memory:
    """One memory of one head in one sequence: its weights, their momentum, and those of the last boundary."""

    def __init__(self, initial: torch.nn.Module, head: int):
        self.weights = {name: parameter[head] for name, parameter in initial.named_parameters()}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.boundary = self.weights

    def answer(self, weights: dict[str, Tensor], z: Tensor) -> Tensor:
        if "w" in weights:
            return weights["w"] @ z
        y = weights["w1"] @ torch.nn.functional.silu(weights["w2"] @ z)
        return z + y if len(y) == len(z) else y

    def write(self, config: SelfModifyingConfig, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor) -> None:
        """One step of the inner rule; the inner loss's gradient at the boundary by automatic differentiation."""
        inner = {name: weight.clone() for name, weight in self.boundary.items()}
        answer = self.answer(inner, k)
        target = self.answer(self.boundary, v) if config.targets == "self" else v
        error = answer - target if config.objective == "l2" else -target
        if config.error_cap is not None:
            error = error * torch.clamp(config.error_cap / torch.sqrt((error * error).sum() + 1e-12), max=1.0)
        gradients = torch.autograd.grad(answer, list(inner.values()), grad_outputs=error, create_graph=True)
        hidden = torch.nn.functional.silu(self.boundary["w2"] @ k) if "w2" in inner else None
        after = {}
        for name, gradient in zip(inner, gradients, strict=True):
            key = hidden / torch.sqrt((hidden * hidden).sum() + 1e-2) if name == "w1" else k
            erase = eta * torch.outer(key, key) if config.inner_rule == "dgd" else 0.0
            self.momentum[name] = mu * self.momentum[name] - (1 - mu) * eta * gradient
            keep = alpha * torch.eye(len(key), dtype=key.dtype) - erase
            after[name] = self.weights[name] @ keep + self.momentum[name]
        self.weights = after


def naive_head(mixer: SelfModifying, head: int, streams: dict[str, Tensor]) -> Tensor:
    """Run one head over one sequence, token by token: streams `[T, D]` to outputs `[T, D]`."""
    config = mixer.config
    memories = {
        name: Memory(getattr(bank, name), head)
        for bank in mixer.banks.values()
        for name in bank.vector_memories + bank.gate_memories
    }

    def gate(name: str, x: Tensor) -> Tensor:
        module = mixer.gates[name]
        logit = memories[name].answer(memories[name].boundary, x)[0] if name in memories else module.weight[head] @ x
        return torch.sigmoid(logit + module.bias[head])

    def stream(name: str, x: Tensor) -> Tensor:
        return memories[name].answer(memories[name].boundary, unit(x)) if name in memories else x

    outputs = []
    for t in range(len(streams["k"])):
        for name, memory in memories.items():
            if t % mixer.chunks[0 if name == "mem" else 1] == 0:
                memory.boundary = memory.weights
        k, q, v = (stream(name, streams[name][t]) for name in ("k", "q", "v"))
        k, q, v = unit(k), unit(q), unit(v) if config.targets == "self" else v
        x = unit(streams["k"][t])
        eta = config.eta_max * gate("eta", x)
        alpha = gate("alpha", x) if config.retention else torch.ones((), dtype=x.dtype)
        mu = gate("mu", x) if config.momentum else torch.zeros((), dtype=x.dtype)
        main = memories["mem"]
        before = main.weights
        for memory in memories.values():
            memory.write(config, k, v, eta, alpha, mu)
        source = {"prefix": before, "inclusive": main.weights, "boundary": main.boundary}[config.read]
        outputs.append(main.answer(source, q))
    return torch.stack(outputs)


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
    outputs = []
    for b in range(batch):
        for h in range(heads):
            streams = {name: convolved[:, b, h, i] for i, name in enumerate(("k", "v", "q"))}
            y = naive_head(mixer, h, streams)
            y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * mixer.norm.weight[h]
            if mixer.config.gate:
                y = y * torch.nn.functional.silu(mixed[:, b, h, 3])
            outputs.append(y)
    result = torch.stack(outputs).view(batch, heads, tokens, dim).permute(2, 0, 1, 3)
    return result.flatten(2) @ mixer.out_proj.weight.T
