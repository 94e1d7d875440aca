"""Memories of a mixer, each with its parameters, and as a bank: side by side in one tensor per matrix."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns_hope import State

KEY_EPS = 1e-2  # of hopescale's memories: keeps the direction of an erased memory's answer from being amplified


class Memory(nn.Module):
    """An associative memory per head: `W z`, or an MLP `z + W1 silu(W2 z)` (without `z` if it answers with a number).

    Its parameters are the state before the first token.
    """

    def __init__(self, heads: int, dim: int, size_out: int, hidden: int | None):
        super().__init__()
        self.residual = size_out == dim
        shapes = {"w": (size_out, dim)} if hidden is None else {"w2": (hidden, dim), "w1": (size_out, hidden)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))

    def retrieve(self, weights: State, x: Tensor) -> Tensor:
        """Answer `x` `[B, H, C, D]` with fixed weights."""
        if "w" in weights:
            return x @ weights["w"].mT
        answer = F.silu(x @ weights["w2"].mT) @ weights["w1"].mT
        return x + answer if self.residual else answer


class Bank:
    """Memories that are written with the same keys and gates; those that answer with vectors stand before gates.

    Linear memories are one matrix `w` `[B, H, R, D]` per head, with the rows of all. Of MLPs, `w2` `[B, H, M * E, D]`
    is alike; `w1` `[B, H, M, D, E]` has a matrix per memory, and `w1_gates` `[B, H, M, E]` a row.

    Args:
        config: Config of the mixer.
        memories: Memories by name; the first answers queries.
        gates: Names of those that answer with a number.
    """

    def __init__(self, config: SimpleNamespace, memories: dict[str, Memory], gates: tuple[str, ...]):
        self.config, self.names, self.gates = config, tuple(memories), gates
        self.vectors, self.residual_gates = len(memories) - len(gates), False
        weights = dict(next(iter(memories.values())).named_parameters())
        self.linear = "w" in weights
        self.dim = (weights["w"] if self.linear else weights["w2"]).shape[-1]
        self.hidden = None if self.linear else weights["w2"].shape[1]
        self.normalize = not self.linear if config.normalize_writes is None else config.normalize_writes
        self.residual_gates = self.dim == 1  # then an answer is as wide as its key
        self.sizes = {"w": self.dim} if self.linear else {"w2": self.hidden, "w1": 1}
        if gates and not self.linear:
            self.sizes["w1_gates"] = 0
        # Streams, of keys, values and queries, that a memory answers: any of three are evenly spaced.
        asked = [number for number, name in enumerate("kvq") if name in memories]
        self.asked = slice(asked[0], asked[-1] + 1, 2 if asked == [0, 2] else 1) if asked else None

    def pack(self, memories: dict[str, Memory]) -> State:
        """Return the parameters of memories side by side, in float32, without the dimension of rows."""
        weights = [{name: weight.float() for name, weight in memories[one].named_parameters()} for one in self.names]
        if self.linear:
            return {"w": torch.cat([one["w"] for one in weights], dim=1)}
        second = [one["w1"] for one in weights]
        packed = {"w2": torch.cat([one["w2"] for one in weights], dim=1)}
        packed["w1"] = torch.stack(second[: self.vectors], dim=1)
        if self.gates:
            packed["w1_gates"] = torch.cat(second[self.vectors :], dim=1)
        return packed

    def part(self, packed: State, name: str) -> State:
        """Return the matrices of one memory, each `[B, H, ., .]`."""
        number = self.names.index(name)
        gate = number - self.vectors
        if self.linear:
            start, size = (number * self.dim, self.dim) if gate < 0 else (self.vectors * self.dim + gate, 1)
            return {"w": packed["w"][:, :, start : start + size]}
        first = packed["w2"][:, :, number * self.hidden : (number + 1) * self.hidden]
        return {
            "w2": first,
            "w1": packed["w1"][:, :, number] if gate < 0 else packed["w1_gates"][:, :, gate : gate + 1],
        }

    def writes(self, packed: State, k: Tensor, v: Tensor, scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Return key and value of each token's write into each matrix, with the memories' gradients at fixed weights.

        Args:
            packed: Weights at which gradients are taken.
            k: Keys `[B, H, C, D]`.
            v: Values, likewise.
            scale: Factor of errors `[B, H, C]`; None is 1.
        """
        asked = torch.cat([k, v], dim=2) if self.config.targets == "self" else k
        size = k.shape[2]
        if self.linear:
            vectors, gates = self._split(asked @ packed["w"].mT)
            errors = self._errors(vectors, gates, v, scale)
            return {"w": (k, -torch.cat([error.transpose(2, 3).flatten(3) for error in errors], dim=-1))}
        inner = (asked @ packed["w2"].mT).unflatten(-1, (-1, self.hidden)).transpose(2, 3)  # [B, H, M, C, E]
        slope = torch.sigmoid(inner)
        hidden = inner * slope
        seconds = [packed["w1"], packed["w1_gates"].unsqueeze(3)] if self.gates else [packed["w1"]]
        vectors = asked.unsqueeze(2) + hidden[:, :, : self.vectors] @ seconds[0].mT
        gates = hidden[:, :, self.vectors :] @ seconds[1].mT if self.gates else None
        if self.gates and self.residual_gates:
            gates = gates + asked.unsqueeze(2)
        errors = self._errors(vectors, gates, v, scale)
        hidden, slope = hidden[..., :size, :], slope[..., :size, :]
        back = torch.cat([error @ second for error, second in zip(errors, seconds, strict=True)], dim=2)
        first = -back * (slope + hidden * (1 - slope))
        length = torch.sqrt(hidden.square().sum(-1, keepdim=True) + KEY_EPS)
        written = length
        if self.normalize:  # divided by squares of what errors are amplified by, above 1
            squares = torch.cat([error.square().sum(-1, keepdim=True) for error in errors], dim=2)
            gain = first.square().sum(-1, keepdim=True) / squares.clamp_min(1e-30)
            first, written = first / gain.clamp_min(1), torch.minimum(length, 1 / length)
        key, cut = hidden / length, self.vectors
        found = {"w2": (k, first.transpose(2, 3).flatten(3)), "w1": (key[:, :, :cut], -written[:, :, :cut] * errors[0])}
        if self.gates:
            found["w1_gates"] = (key[:, :, cut:], -written[:, :, cut:] * errors[1])
        return found

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Part the answers `[B, H, C, R]` of linear memories: vectors `[B, H, M, C, D]`, numbers `[B, H, M, C, 1]`."""
        cut = self.vectors * self.dim
        vectors = rows[..., :cut].unflatten(-1, (-1, self.dim)).transpose(2, 3)
        return vectors, rows[..., cut:].mT.unsqueeze(-1) if self.gates else None

    def _errors(self, vectors: Tensor, gates: Tensor | None, v: Tensor, scale: Tensor | None) -> list[Tensor]:
        """Return the gradient of the inner loss with respect to answers, given the answers to `k`, and to `v`."""
        errors = []
        for answer in (vectors, gates) if self.gates else (vectors,):
            if self.config.targets == "self":
                found, target = answer.chunk(2, dim=3)
            else:
                found, target = answer, v.unsqueeze(2)
            error = -target if self.config.objective == "dot" else found - target
            if self.config.objective != "dot" and self.config.error_cap is not None:
                cap = self.config.error_cap * torch.rsqrt(error.square().sum(-1, keepdim=True) + 1e-12)
                error = error * cap.clamp_max(1.0)
            errors.append(error if scale is None else error * scale[:, :, None, :, None])
        return errors
