"""How the work is cut, and where the kernels keep what: settings that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.self_modifying.types import MemorySpec, Streams, Weights

NARROW_COLUMNS = 16
"""Columns that the one of a gate memory is padded to: the least that a matrix product takes."""

BLOCK = 32
"""Rows of a memory that are in registers at a time."""

LONGEST_PIECE = 32
"""Most tokens of a piece of a chunk: the tables of longer ones leave the registers."""


@dataclass(frozen=True)
class KernelConfig:
    """What kernels are compiled for.

    Attributes:
        dim: `D`.
        hidden: `E`; `D` for linear memories.
        rows: Most tokens of a piece, a power of two.
        doublings: Its logarithm.
        cut: Whether chunks have several pieces.
        block: Rows of a memory that are in registers at a time.
        vector_memories: Number of vector memories.
        gate_memories: Number of gate memories.
        mlp: Whether memories are MLPs.
        momentum: Whether there is momentum.
        retention: Whether there is a gate of retention.
        erase: As in `MemorySpec`.
        l2: Whether the objective is `l2`.
        own_target: As in `MemorySpec`.
        error_cap: As in `MemorySpec`.
        key_eps: As in `MemorySpec`.
        eta_max: As in `MemorySpec`.
        read: As in `MemorySpec`.
        memory_k: Which vector memory makes keys; -1 is none.
        memory_v: Which makes values.
        memory_q: Which makes queries.
        memory_eta: Which gate memory adds to the logits of `eta`; -1 is none.
        memory_alpha: Which adds to those of `alpha`.
        precision: Of matrix products.
    """

    dim: int
    hidden: int
    rows: int
    doublings: int
    cut: bool
    block: int
    vector_memories: int
    gate_memories: int
    mlp: bool
    momentum: bool
    retention: bool
    erase: bool
    l2: bool
    own_target: bool
    error_cap: float | None
    key_eps: float
    eta_max: float
    read: str
    memory_k: int
    memory_v: int
    memory_q: int
    memory_eta: int
    memory_alpha: int
    precision: str

    @classmethod
    def of(cls, streams: Streams, spec: MemorySpec) -> KernelConfig:
        """Plan a call; streams are `[B, H, T, D]`."""
        dim = streams.k.shape[-1]
        rows = max(16, min(LONGEST_PIECE, 1 << (min(spec.chunk_size, streams.k.shape[2]) - 1).bit_length()))
        return cls(
            dim=dim,
            hidden=spec.hidden or dim,
            rows=rows,
            doublings=rows.bit_length() - 1,
            cut=min(spec.chunk_size, streams.k.shape[2]) > rows,
            block=min(dim, BLOCK),
            vector_memories=len(spec.vector_memories),
            gate_memories=len(spec.gate_memories),
            mlp=spec.hidden is not None,
            momentum=streams.mu is not None,
            retention=streams.alpha is not None,
            erase=spec.erase,
            l2=spec.objective == "l2",
            own_target=spec.own_target,
            error_cap=spec.error_cap,
            key_eps=spec.key_eps,
            eta_max=spec.eta_max,
            read=spec.read,
            precision="tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            **{f"memory_{name}": _index(spec.vector_memories, name) for name in "kvq"},
            **{f"memory_{name}": _index(spec.gate_memories, name) for name in ("eta", "alpha")},
        )

    @property
    def narrow_columns(self) -> int:
        """Columns of a gate memory's answers."""
        return NARROW_COLUMNS

    @property
    def narrow_width(self) -> int:
        """Columns of a gate memory's block of first layers."""
        return self.hidden if self.mlp else NARROW_COLUMNS

    @property
    def columns(self) -> int:
        """Columns of all first layers side by side."""
        return self.vector_memories * self.hidden + self.gate_memories * self.narrow_width

    @property
    def second(self) -> int:
        """Where second layers begin in a packed set of weights."""
        return self.dim * self.columns

    @property
    def size(self) -> int:
        """Numbers in a packed set of weights."""
        return self.second + self.mlp * self.hidden * (
            self.vector_memories * self.dim + self.gate_memories * NARROW_COLUMNS
        )

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return 4 if max(self.dim, self.hidden) < 64 else 8

    @property
    def matrix(self) -> int:
        """Numbers that a piece's matrix of tokens takes in scratch memory."""
        return self.rows * max(self.dim, self.hidden)

    def pack(self, weights: Weights) -> Tensor:
        """Lay weights side by side, `[B, H, size]`: first layers, vector second layers, gate memories padded."""
        columns, num_gates, parts = self.vector_memories * self.hidden, self.gate_memories, []
        w_in = weights.w_in
        if not self.mlp and num_gates:
            padded = F.pad(w_in[..., columns:, None], (0, NARROW_COLUMNS - 1)).flatten(3)
            w_in = torch.cat([w_in[..., :columns], padded], dim=-1)
        parts.append(w_in)
        if weights.w_out_vector is not None:
            parts.append(weights.w_out_vector)
        if weights.w_out_gate is not None:
            parts.append(F.pad(weights.w_out_gate, (0, NARROW_COLUMNS - 1)))
        return torch.cat([part.flatten(2) for part in parts], dim=2)

    def unpack(self, packed: Tensor) -> Weights:
        """Undo `pack`."""
        w_in = packed[..., : self.second].unflatten(2, (self.dim, self.columns))
        if not self.mlp:
            vector_memories = self.vector_memories * self.hidden
            return Weights(
                torch.cat([w_in[..., :vector_memories], w_in[..., vector_memories::NARROW_COLUMNS]], dim=-1), None, None
            )
        middle = self.second + self.vector_memories * self.hidden * self.dim
        vector_memories = packed[..., self.second : middle].unflatten(2, (self.vector_memories, self.hidden, self.dim))
        w_out_gate = None
        if self.gate_memories:
            w_out_gate = packed[..., middle:].unflatten(2, (self.gate_memories, self.hidden, NARROW_COLUMNS))[..., :1]
        return Weights(w_in, vector_memories, w_out_gate)


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1
