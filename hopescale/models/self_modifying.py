"""Self-modifying Titans (Nested Learning, arXiv 2512.24695, Eq. 83-91): the mixer of Hope."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.schema import SelfModifyingConfig
from hopescale.models.memory import BankState, InnerRule, MemoryBank, Weights
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.ops.delta_rule import chunk_tables
from hopescale.ops.norm import l2_norm
from hopescale.ops.short_conv import short_conv
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh


class Gate(nn.Module):
    """A number per head and token in (0, 1): a sigmoid around a learned bias.

    Args:
        num_heads: Heads of this rank.
        start: Value at initialisation.
        head_dim: Width of the input of a static gate; None if a memory supplies the logit.
    """

    def __init__(self, num_heads: int, start: float, head_dim: int | None):
        super().__init__()
        shared = {"partition_dim": 0, "keep_fp32": True}
        spec = ParameterSpec(mean=math.log(start / (1 - start)), **shared)
        self.bias = new_parameter(num_heads, spec=spec)
        self.weight = None
        if head_dim is not None:
            self.weight = new_parameter(num_heads, head_dim, spec=ParameterSpec(std=0.1 / head_dim**0.5, **shared))

    def forward(self, x: Tensor) -> Tensor:
        """Open the gate: `x` is the logit `[B, H, C]`, or the input `[B, H, C, D]` of a static gate."""
        logit = x if self.weight is None else (x * self.weight[:, None]).sum(-1)
        return torch.sigmoid(logit + self.bias[:, None])


STREAMS = ("k", "v", "q")


class Projections(NamedTuple):
    """What one chunk is written with: `q`, `k`, `v` `[B, H, C, D]`; `eta`, `alpha`, `mu` `[B, H, C]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    alpha: Tensor
    mu: Tensor | None

    def split(self, sizes: list[int]) -> Iterator[Projections]:
        """Cut the tokens into parts of these sizes."""
        parts = (repeat(None) if x is None else x.split(sizes, dim=2) for x in self)
        return (Projections(*part) for _, *part in zip(sizes, *parts, strict=False))


class SelfModifying(nn.Module):
    """In-projection, short convolution, memories per head, RMSNorm per head, out-projection.

    The heads are split over tensor-parallel ranks; the recurrence communicates nothing.

    Args:
        d_model: Width of the residual stream.
        num_heads: Heads in all.
        head_dim: `D`.
        config: Switches and starting values.
        norm_eps: Added under the root of the RMSNorm.
        out_std: Standard deviation of the out-projection's initial weights.
        mesh: Where this process stands.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        config: SelfModifyingConfig,
        *,
        norm_eps: float,
        out_std: float,
        mesh: Mesh,
    ):
        super().__init__()
        self.config, self.head_dim = config, head_dim
        self.heads = num_heads // mesh.tp_group.size()
        adaptive = set(config.adaptive)
        slices = len(STREAMS) + config.gate  # the output gate last
        self.in_proj = ColumnLinear(d_model, num_heads * head_dim * slices, std=d_model**-0.5, mesh=mesh)
        self.conv = None
        if config.conv_width:
            spec = ParameterSpec(std=config.conv_width**-0.5, partition_dim=0, keep_fp32=True)
            channels = self.heads * len(STREAMS) * head_dim
            self.conv = nn.ParameterDict({"weight": new_parameter(channels, config.conv_width, spec=spec)})
        self.gates = nn.ModuleDict(self._gates(adaptive))
        self.chunks = (config.chunk_size, config.projection_chunk_size or config.chunk_size)
        self.banks = nn.ModuleDict(self._banks(adaptive))
        self.norm = RMSNorm(self.heads, head_dim, eps=norm_eps, partition_dim=0)
        self.out_proj = RowLinear(num_heads * head_dim, d_model, std=out_std, mesh=mesh)

    def _gates(self, adaptive: set[str]) -> dict[str, Gate]:
        config, dim = self.config, self.head_dim
        gates = {"eta": Gate(self.heads, config.eta_init, None if "eta" in adaptive else dim)}
        if config.retention:
            gates["alpha"] = Gate(self.heads, config.alpha_init, None if "alpha" in adaptive else dim)
        if config.momentum:
            gates["mu"] = Gate(self.heads, config.mu_init, dim)
        return gates

    def _banks(self, adaptive: set[str]) -> dict[str, MemoryBank]:
        """One bank for all memories, or two if `mem` has boundaries of its own."""
        config = self.config
        wide = tuple(name for name in "kv" if name in adaptive) + ("q",) * (config.query == "memory")
        narrow = tuple(name for name in ("eta", "alpha") if name in adaptive)
        rule = InnerRule(config.targets, config.objective, config.inner_rule == "dgd", config.error_cap)
        hidden = (config.memory_dim or self.head_dim) if config.memory == "mlp" else None
        sizes = {"num_heads": self.heads, "head_dim": self.head_dim, "hidden": hidden, "rule": rule}
        if self.chunks[0] == self.chunks[1]:
            return {"memory": MemoryBank(("mem", *wide), narrow, **sizes)}
        return {"memory": MemoryBank(("mem",), (), **sizes), "projection": MemoryBank(wide, narrow, **sizes)}

    def initial_state(self, batch: int) -> LayerState:
        """Return the learned initial state for `batch` sequences."""
        tensors = {}
        for name, bank in self.banks.items():
            tensors |= _pack(name, bank.initial_state(batch, self.config.momentum))
        if self.conv is not None:
            weight = self.conv["weight"]
            tensors["conv_tail"] = weight.new_zeros(weight.shape[1] - 1, batch, weight.shape[0]).transpose(0, 1)
        return LayerState(0, tensors)

    def forward(
        self, x: Tensor, state: LayerState | None = None, probe: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: Where an earlier call ended; None begins at the learned initial state.
            probe: Filled with scalar means of this call (`eta_mean`, `alpha_mean`, `surprise`) if given.

        Returns:
            Residual activations and the state after the last token.
        """
        state = self.initial_state(x.shape[1]) if state is None else state
        streams, gate, tail = self._project(x, state.tensors.get("conv_tail"))
        banks = {name: _unpack(name, state.tensors) for name in self.banks}
        outputs, seen = [], []
        position = state.position
        sizes = _pieces(position, streams["k"].shape[2], self.chunks[1])
        for parts in zip(*(stream.split(sizes, dim=2) for stream in streams.values()), strict=True):
            y, banks = self._run(dict(zip(streams, parts, strict=True)), position, banks, seen)
            outputs.append(y)
            position += parts[0].shape[2]
        y = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]  # [B, H, T, D]
        y = self.norm(y.permute(2, 0, 1, 3)).to(x.dtype)  # [T, B, H, D]
        if gate is not None:
            y = y * F.silu(gate)
        if probe is not None:
            probe |= _summary(seen)
        tensors = {} if tail is None else {"conv_tail": tail.transpose(0, 1)}
        for name, bank in banks.items():
            tensors |= _pack(name, bank)
        return self.out_proj(y.flatten(2)), LayerState(position, tensors)

    def _project(self, x: Tensor, tail: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Project and convolve: streams `[B, H, T, D]` in fp32, the output gate `[T, B, H, D]`, the convolution's tail.

        Each head's slices lie side by side in the in-projection, so that a rank holds whole heads.
        """
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1, self.head_dim))  # [T, B, H, S, D]
        gate = mixed[..., len(STREAMS), :] if self.config.gate else None
        mixed = mixed[..., : len(STREAMS), :].flatten(2)
        if self.conv is not None:
            mixed, tail = short_conv(mixed, self.conv["weight"].to(x.dtype), tail.transpose(0, 1))
        kind = torch.promote_types(x.dtype, torch.float32)
        parts = mixed.to(kind).unflatten(-1, (self.heads, len(STREAMS), self.head_dim)).permute(3, 1, 2, 0, 4)
        return dict(zip(STREAMS, parts.unbind(), strict=True)), gate, tail

    def _run(
        self, streams: dict[str, Tensor], position: int, banks: dict[str, BankState], seen: list
    ) -> tuple[Tensor, dict[str, BankState]]:
        """Run one projection chunk, or a part of one: project at its boundary, then move the memories."""
        source = "projection" if "projection" in banks else "memory"
        if position % self.chunks[1] == 0:
            banks = banks | {source: banks[source].at_boundary()}
        made = self._made(self.banks[source], banks[source].boundary, streams)
        main, outputs = banks["memory"], []
        for part in made.split(_pieces(position, made.k.shape[2], self.chunks[0])):
            if position % self.chunks[0] == 0:
                main = main.at_boundary()
            y, main = self._move("memory", main, part, seen)
            outputs.append(y)
            position += part.k.shape[2]
        banks = banks | {"memory": main}
        if source == "projection":
            banks[source] = self._move(source, banks[source], made, None)[1]
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], banks

    def _made(self, bank: MemoryBank, boundary: Weights, streams: dict[str, Tensor]) -> Projections:
        """Make keys, values, queries and gates, by memories where they are adaptive (Eq. 90).

        Memories are asked at unit inputs only: streams, keys and values of any other length would let a memory that
        reads its own answers grow without bound.
        """
        unit = {name: l2_norm(stream) for name, stream in streams.items()}
        answers = bank.ask(boundary, {name: unit[name] for name in bank.wide if name in unit}, unit["k"])
        gates = {name: gate(answers.get(name, unit["k"])) for name, gate in self.gates.items()}
        eta = self.config.eta_max * gates["eta"]
        alpha = gates.get("alpha", torch.ones_like(eta))
        q, k = (l2_norm(answers[name]) if name in answers else unit[name] for name in ("q", "k"))
        v = answers.get("v", streams["v"])
        v = l2_norm(v) if self.config.targets == "self" else v
        return Projections(q, k, v, eta, alpha, gates.get("mu"))

    def _move(
        self, name: str, state: BankState, made: Projections, seen: list | None
    ) -> tuple[Tensor | None, BankState]:
        bank = self.banks[name]
        tables = chunk_tables(made.eta, made.alpha, made.mu)
        writes = bank.writes(state.boundary, made.k, made.v, made.mu)
        if seen is not None:
            seen.append((made.eta.detach(), made.alpha.detach(), writes.surprise[:, :, 0]))
        return bank.advance(state, writes, tables, made.q if name == "memory" else None, self.config.read)


def _pieces(position: int, tokens: int, size: int) -> list[int]:
    """Cut `tokens` tokens that follow `position` others at multiples of `size`; return the sizes of the parts."""
    first = min(tokens, size - position % size)
    rest = tokens - first
    return [first, *[size] * (rest // size), *[rest % size] * (rest % size > 0)]


def _summary(seen: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    eta, alpha, surprise = (torch.cat(parts, dim=2).mean() for parts in zip(*seen, strict=True))
    return {"eta_mean": eta, "alpha_mean": alpha, "surprise": surprise}


def _pack(name: str, state: BankState) -> dict[str, Tensor]:
    """Name a bank's tensors `bank/kind/layer`."""
    return {
        f"{name}/{kind}/{layer}": tensor
        for kind, weights in state._asdict().items()
        if weights is not None
        for layer, tensor in weights._asdict().items()
        if tensor is not None
    }


def _unpack(name: str, tensors: dict[str, Tensor]) -> BankState:
    """Undo `_pack`."""
    kinds = {}
    for kind in BankState._fields:
        parts = [tensors.get(f"{name}/{kind}/{layer}") for layer in Weights._fields]
        kinds[kind] = None if parts[0] is None else Weights(*parts)
    return BankState(**kinds)
