"""The memories token by token, as the equations read. Slow; the reference for every faster form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.documents import Documents
from hopescale.ops.norm import l2_norm
from hopescale.ops.self_modifying.types import (
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)

Layers = dict[str, Tensor]
"""Weights of one memory by layer: `in` `[B, H, D, R]`, and `out` `[B, H, E, Do]` of an MLP."""


class _Memory:
    """One memory: its weights, their momentum, and the weights at the last boundary."""

    def __init__(self, spec: MemorySpec, name: str, index: int, state: MemoryState):
        self.spec, self.adds_input = spec, name in spec.vector_memories
        self.weights = self._layers(state.running, index)
        self.boundary = self._layers(state.boundary, index)
        self.momentum = self._layers(state.momentum, index) if state.momentum is not None else None

    def _layers(self, weights: Weights, index: int) -> Layers:
        count, rows = len(self.spec.vector_memories), self.spec.hidden or weights.w_in.shape[-2]
        if self.adds_input:
            layers = {"in": weights.w_in[..., index * rows : (index + 1) * rows], "out": weights.w_out_vector}
        else:
            index, width = index - count, self.spec.hidden or 1
            first = count * rows + index * width
            layers = {"in": weights.w_in[..., first : first + width], "out": weights.w_out_gate}
        return {name: w if name == "in" else w[:, :, index] for name, w in layers.items() if w is not None}

    def answer(self, weights: Layers, z: Tensor) -> Tensor:
        """Return `M(z)` `[B, H, Do]` for inputs `[B, H, D]`."""
        y = _times(z, weights["in"])
        if "out" not in weights:
            return y
        y = _times(F.silu(y), weights["out"])
        return z + y if self.adds_input else y

    def write(self, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor | None) -> Tensor:
        """Take one step of the inner rule; return the norm of the error.

        The gradient of the inner loss at the boundary comes from automatic differentiation.
        """
        spec = self.spec
        inner = {
            name: w.clone() if w.requires_grad else w.detach().requires_grad_() for name, w in self.boundary.items()
        }
        answer = self.answer(inner, k)
        target = self.answer(self.boundary, v) if spec.own_target else v
        error = answer - target if spec.objective == "l2" else -target
        if spec.error_cap is not None:
            length = torch.sqrt((error * error).sum(-1, keepdim=True) + 1e-12)
            error = error * torch.clamp(spec.error_cap / length, max=1.0)
        gradients = torch.autograd.grad(answer, list(inner.values()), grad_outputs=error, create_graph=True)
        keys, gains = {"in": k}, {}
        if "out" in inner:
            hidden = F.silu(_times(k, self.boundary["in"]))
            length = torch.sqrt((hidden * hidden).sum(-1, keepdim=True) + spec.key_eps)
            keys["out"] = hidden / length
            if spec.normalize_writes:
                # The gradient of a matrix is its key times the gradient at what it answers.
                square = ((k * k).sum(-1) * (error * error).sum(-1)).clamp_min(1e-30)
                gain = (gradients[0] * gradients[0]).sum((-1, -2)) / square
                gains = {"in": gain[..., None], "out": length * length}
        eta, alpha = eta[..., None, None], alpha[..., None, None]
        after = {}
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            key = keys[name]
            push = -eta * gradient
            if name in gains:
                push = push / gains[name][..., None].clamp_min(1)
            if self.momentum is not None:
                kept = mu[..., None, None]
                fresh = 1 - kept if spec.momentum_write == "averaged" else 1.0
                push = self.momentum[name] = kept * self.momentum[name] + fresh * push
            after[name] = alpha * weight + push
            if spec.erase:
                after[name] = after[name] - eta * key[..., :, None] * _times(key, weight)[..., None, :]
        self.weights = after
        return error.norm(dim=-1)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows `[B, H, D]` by matrices `[B, H, D, R]`."""
    return (x[..., None, :] @ weight)[..., 0, :]


def self_modifying_naive(
    streams: Streams, state: Memories, spec: MemorySpec, *, position: int = 0, documents: Documents | None = None
) -> SelfModifyingOutput:
    """Run memories over a sequence as a loop over tokens. Arguments and result of `self_modifying`."""
    if documents is not None:
        return _apart(streams, state, spec, documents)
    banks = [(bank, part) for bank, part in zip(spec.banks, state, strict=True) if bank is not None]
    memories = {
        name: _Memory(bank, name, index, part)
        for bank, part in banks
        for index, name in enumerate(bank.vector_memories + bank.gate_memories)
    }
    outputs, stats = [], []
    with torch.enable_grad():
        for t in range(streams.k.shape[2]):
            for memory in memories.values():
                if (position + t) % memory.spec.chunk_size == 0:
                    memory.boundary = memory.weights
            y, seen = _token(memories, spec, Streams(*(None if x is None else x[:, :, t] for x in streams)))
            outputs.append(y)
            stats.append(seen)
    after = [_state([memories[n] for n in bank.vector_memories + bank.gate_memories], bank) for bank, _ in banks]
    y, stats = torch.stack(outputs, dim=2), torch.stack(stats, dim=2).detach()
    return SelfModifyingOutput(y, stats, Memories(after[0], after[1] if len(after) > 1 else None))


def _apart(streams: Streams, state: Memories, spec: MemorySpec, documents: Documents) -> SelfModifyingOutput:
    """Run each document alone."""
    tokens, rows = streams.k.shape[2], []
    for begin, end in zip(documents.bounds, documents.bounds[1:], strict=False):
        row, first = divmod(begin, tokens)
        here = slice(row, row + 1), slice(None), slice(first, first + end - begin)
        if first == 0:
            rows.append([])
        own = Streams(*(None if x is None else x[here] for x in streams))
        rows[-1].append(self_modifying_naive(own, state, spec))
    y, stats = (torch.cat([torch.cat([part[n] for part in row], dim=2) for row in rows]) for n in (0, 1))
    return SelfModifyingOutput(y, stats, Memories.cat([row[-1].state for row in rows]))


def _token(memories: dict[str, _Memory], spec: MemorySpec, token: Streams) -> tuple[Tensor, Tensor]:
    """Read and write with the streams of one token: the answer `[B, H, D]`, and its statistics `[B, H, 3]`."""

    def answer(name: str, x: Tensor) -> Tensor:
        return memories[name].answer(memories[name].boundary, x)

    k, v, q = (l2_norm(answer(n, x)) if n in memories else x for n, x in zip("kvq", token[:3], strict=True))
    gates = {
        name: torch.sigmoid(logit + answer(name, token.k)[..., 0] if name in memories else logit)
        for name, logit in zip(("eta", "alpha", "mu"), token[3:], strict=True)
        if logit is not None
    }
    eta = spec.eta_max * gates["eta"]
    alpha = gates.get("alpha", torch.ones_like(eta))
    main = memories[spec.vector_memories[0]]
    before = main.weights
    errors = [memory.write(k, v, eta, alpha, gates.get("mu")) for memory in memories.values()]
    source = {"prefix": before, "inclusive": main.weights, "boundary": main.boundary}[spec.read]
    return main.answer(source, q), torch.stack([eta, alpha, errors[0]], dim=-1)


def _state(memories: list[_Memory], spec: MemorySpec) -> MemoryState:
    """Lay the weights of the memories of a bank side by side."""

    def join(kind: str) -> Weights | None:
        layers = [getattr(memory, kind) for memory in memories]
        if layers[0] is None:
            return None
        count = len(spec.vector_memories)
        out = [[layer["out"] for layer in part if "out" in layer] for part in (layers[:count], layers[count:])]
        outs = (torch.stack(part, dim=2) if part else None for part in out)
        return Weights(torch.cat([layer["in"] for layer in layers], dim=-1), *outs)

    return MemoryState(*map(join, ("weights", "momentum", "boundary")))
