"""How the work is cut, and where the kernels keep what: settings that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hopescale.ops.backends import Products
from hopescale.ops.limits import BLOCK, KERNEL_KEEPS, KERNEL_PIECE
from hopescale.ops.self_modifying.triton import scratch as at
from hopescale.ops.self_modifying.types import MemorySpec, Streams

ROWS = 64
"""Rows of a memory that are in registers at a time."""


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer of every memory of a kind, in packed weights and in scratch memory.

    Attributes:
        begin: Index of the first memory's layer in a packed set of weights.
        step: Distance from one memory's layer to the next.
        row: Distance from one of its rows to the next.
        inputs: Width of keys, `K`.
        outputs: Width of values, `N`.
        similar: Place of the products of keys with one another, with two tables made of them right behind.
        d_values: Place of the gradient of what is written, with that of what was held right behind.
        d_keys: Place of the gradient of keys.
    """

    begin: int
    step: int
    row: int
    inputs: int
    outputs: int
    similar: int
    d_values: int
    d_keys: int


@dataclass(frozen=True)
class MemoryKind:
    """Memories that answer alike.

    Attributes:
        first: First layers, or all there is of linear memories.
        second: Second layers; of linear memories only `outputs` means something.
        narrow: Whether memories answer with one number.
    """

    first: PackedLayer
    second: PackedLayer
    narrow: bool


@dataclass(frozen=True)
class KernelConfig:
    """What kernels are compiled for.

    Attributes:
        spec: Memories, without the sizes of their chunks.
        dim: Width `D` of a head.
        hidden: Width `E`; `D` for linear memories.
        rows: Most tokens of a piece, a power of two.
        doublings: Logarithm of `rows`.
        cut: Whether chunks have several pieces.
        block: Rows of a memory that are in registers at a time.
        vector_memories: Number of vector memories.
        gate_memories: Number of gate memories.
        mlp: Whether memories are MLPs.
        momentum: Whether there is momentum.
        averaged: Whether a write enters it by `1 - mu` of its size.
        retention: Whether there is a gate of retention.
        memory_k: Number of the vector memory that makes keys; -1 is none.
        memory_v: Number of the one that makes values.
        memory_q: Number of the one that makes queries.
        memory_eta: Number of the gate memory that adds to the logits of `eta`; -1 is none.
        memory_alpha: Number of the one that adds to those of `alpha`.
        precision: Operands of matrix products.
    """

    spec: MemorySpec
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
    averaged: bool
    retention: bool
    memory_k: int
    memory_v: int
    memory_q: int
    memory_eta: int
    memory_alpha: int
    precision: Products

    @classmethod
    def of(cls, streams: Streams, spec: MemorySpec, products: Products) -> KernelConfig:
        """Plan a call; streams are `[B, H, T, D]`. No length counts: each kernel would be compiled for several."""
        dim = streams.k.shape[-1]
        rows = max(16, min(KERNEL_PIECE, 1 << (spec.chunk_size - 1).bit_length()))
        kinds = spec.vector_memories, spec.gate_memories
        vectors, gates = ({name: number for number, name in enumerate(names)} for names in kinds)
        return cls(
            spec=replace(spec, chunk_size=0, projection_chunk_size=None),
            dim=dim,
            hidden=spec.hidden or dim,
            rows=rows,
            doublings=rows.bit_length() - 1,
            cut=spec.chunk_size > rows,
            block=min(dim, ROWS),
            vector_memories=len(vectors),
            gate_memories=len(gates),
            mlp=spec.hidden is not None,
            momentum=streams.mu is not None,
            averaged=streams.mu is not None and spec.momentum_write == "averaged",
            retention=streams.alpha is not None,
            precision=products,
            **{f"memory_{name}": vectors.get(name, -1) for name in "kvq"},
            **{f"memory_{name}": gates.get(name, -1) for name in ("eta", "alpha")},
        )

    @property
    def narrow_width(self) -> int:
        """Columns of a gate memory's first layer."""
        return self.hidden if self.mlp else BLOCK

    @property
    def columns(self) -> int:
        """Columns of all first layers side by side."""
        return self.vector_memories * self.hidden + self.gate_memories * self.narrow_width

    @property
    def vectors(self) -> MemoryKind:
        """Vector memories."""
        return self._kind(0, self.hidden, self.dim * self.columns, self.dim, narrow=False)

    @property
    def gates(self) -> MemoryKind:
        """Gate memories."""
        first, second = self.vector_memories * self.hidden, self.vector_memories * self.hidden * self.dim
        return self._kind(first, self.narrow_width, self.dim * self.columns + second, BLOCK, narrow=True)

    @property
    def moved_gates(self) -> MemoryKind:
        """What is moved at a time of gate memories: one of them or, as they have the same keys, all linear ones."""
        kind = self.gates
        width = self.narrow_width * max(1, self.gate_memories)
        return kind if self.mlp else replace(kind, first=replace(kind.first, outputs=width))

    @property
    def gate_moves(self) -> int:
        """How many such are moved, one after the other."""
        return self.gate_memories if self.mlp else min(1, self.gate_memories)

    @property
    def layer_matrices(self) -> int:
        """Matrices of first layers in scratch memory on the way back."""
        return at.LAYER_MATRICES.value * (self.vector_memories + self.gate_moves)

    def _kind(self, first: int, width: int, second: int, out: int, *, narrow: bool) -> MemoryKind:
        places = (at.SIMILAR.value, at.D_VALUES.value, at.D_K.value)
        below = PackedLayer(first, width, self.columns, self.dim, width, *places)
        places = (at.SECOND_SIMILAR.value, at.D_SECOND.value, at.D_KEYS.value)
        return MemoryKind(below, PackedLayer(second, self.hidden * out, out, self.hidden, out, *places), narrow)

    @property
    def reading(self) -> int:
        """Distance in scratch memory from what is said of the state before a write to the same of what is read."""
        return 2 if self.spec.read == "inclusive" else 0

    @property
    def size(self) -> int:
        """Numbers in a packed set of weights."""
        outputs = self.vector_memories * self.dim + self.gate_memories * BLOCK
        return self.dim * self.columns + self.mlp * self.hidden * outputs

    @property
    def keeps(self) -> int:
        """Number of chunks in a row of which the state is kept that the first one starts with."""
        return KERNEL_KEEPS

    @property
    def kept_dtype(self) -> torch.dtype:
        """Type of the states that are kept for the backward kernel."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def warps(self) -> int:
        """Warps of a program: with four, of 255 registers, a multiprocessor has room for two programs."""
        width = max(self.dim, self.hidden)
        return 4 if width < 64 or (width == 64 and self.precision == "bf16") else 8

    @property
    def matrix(self) -> int:
        """Numbers that a piece's matrix of tokens takes in scratch memory."""
        return self.rows * max(self.dim, self.hidden, self.moved_gates.first.outputs)
