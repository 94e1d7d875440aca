"""How the work is cut, and where the kernels keep what: settings that kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.self_modifying.types import ChunkRule, Streams, Weights

NARROW_COLUMNS = 16
"""Columns that the one of a narrow memory is padded to: the least that a matrix product takes."""

BLOCK = 32
"""Rows of a memory that are in registers at a time."""

LONGEST_PIECE = 32
"""Most tokens of a piece of a chunk: the tables of longer ones leave the registers."""


@dataclass(frozen=True)
class Plan:
    """What kernels are compiled for.

    Attributes:
        dim: `D`.
        hidden: `E`; `D` for linear memories.
        rows: Most tokens of a piece, a power of two.
        doublings: Its logarithm.
        cut: Whether chunks have several pieces.
        block: Rows of a memory that are in registers at a time.
        wide: Number of wide memories.
        narrow: Number of narrow ones.
        mlp: Whether memories are MLPs.
        momentum: Whether there is momentum.
        retention: Whether there is a gate of retention.
        erase: As in `ChunkRule`.
        l2: Whether the objective is `l2`.
        own_target: As in `ChunkRule`.
        error_cap: As in `ChunkRule`.
        key_eps: As in `ChunkRule`.
        eta_max: As in `ChunkRule`.
        read: As in `ChunkRule`.
        made_k: Which wide memory makes keys; -1 is none.
        made_v: Which makes values.
        made_q: Which makes queries.
        made_eta: Which narrow memory adds to the logits of `eta`; -1 is none.
        made_alpha: Which adds to those of `alpha`.
        precision: Of matrix products.
    """

    dim: int
    hidden: int
    rows: int
    doublings: int
    cut: bool
    block: int
    wide: int
    narrow: int
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
    made_k: int
    made_v: int
    made_q: int
    made_eta: int
    made_alpha: int
    precision: str

    @classmethod
    def of(cls, streams: Streams, rule: ChunkRule) -> Plan:
        """Plan a call; streams are `[B, H, T, D]`."""
        dim = streams.k.shape[-1]
        rows = max(16, min(LONGEST_PIECE, 1 << (min(rule.chunk_size, streams.k.shape[2]) - 1).bit_length()))
        return cls(
            dim=dim,
            hidden=rule.hidden or dim,
            rows=rows,
            doublings=rows.bit_length() - 1,
            cut=min(rule.chunk_size, streams.k.shape[2]) > rows,
            block=min(dim, BLOCK),
            wide=len(rule.wide),
            narrow=len(rule.narrow),
            mlp=rule.hidden is not None,
            momentum=streams.mu is not None,
            retention=streams.alpha is not None,
            erase=rule.erase,
            l2=rule.objective == "l2",
            own_target=rule.own_target,
            error_cap=rule.error_cap,
            key_eps=rule.key_eps,
            eta_max=rule.eta_max,
            read=rule.read,
            precision="tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            **{f"made_{name}": _index(rule.wide, name) for name in "kvq"},
            **{f"made_{name}": _index(rule.narrow, name) for name in ("eta", "alpha")},
        )

    @property
    def narrow_columns(self) -> int:
        """Columns of a narrow memory's answers."""
        return NARROW_COLUMNS

    @property
    def narrow_width(self) -> int:
        """Columns of a narrow memory's block of first layers."""
        return self.hidden if self.mlp else NARROW_COLUMNS

    @property
    def columns(self) -> int:
        """Columns of all first layers side by side."""
        return self.wide * self.hidden + self.narrow * self.narrow_width

    @property
    def second(self) -> int:
        """Where second layers begin in a packed set of weights."""
        return self.dim * self.columns

    @property
    def size(self) -> int:
        """Numbers in a packed set of weights."""
        return self.second + self.mlp * self.hidden * (self.wide * self.dim + self.narrow * NARROW_COLUMNS)

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return 4 if max(self.dim, self.hidden) < 64 else 8

    @property
    def matrix(self) -> int:
        """Numbers that a piece's matrix of tokens takes in scratch memory."""
        return self.rows * max(self.dim, self.hidden)

    def pack(self, weights: Weights) -> Tensor:
        """Lay weights side by side, `[B, H, size]`: first layers, wide second layers, narrow ones padded."""
        wide, narrow, parts = self.wide * self.hidden, self.narrow, []
        first = weights.first
        if not self.mlp and narrow:
            padded = F.pad(first[..., wide:, None], (0, NARROW_COLUMNS - 1)).flatten(3)
            first = torch.cat([first[..., :wide], padded], dim=-1)
        parts.append(first)
        if weights.wide is not None:
            parts.append(weights.wide)
        if weights.narrow is not None:
            parts.append(F.pad(weights.narrow, (0, NARROW_COLUMNS - 1)))
        return torch.cat([part.flatten(2) for part in parts], dim=2)

    def unpack(self, packed: Tensor) -> Weights:
        """Undo `pack`."""
        first = packed[..., : self.second].unflatten(2, (self.dim, self.columns))
        if not self.mlp:
            wide = self.wide * self.hidden
            return Weights(torch.cat([first[..., :wide], first[..., wide::NARROW_COLUMNS]], dim=-1), None, None)
        middle = self.second + self.wide * self.hidden * self.dim
        wide = packed[..., self.second : middle].unflatten(2, (self.wide, self.hidden, self.dim))
        narrow = None
        if self.narrow:
            narrow = packed[..., middle:].unflatten(2, (self.narrow, self.hidden, NARROW_COLUMNS))[..., :1]
        return Weights(first, wide, narrow)


def _index(names: tuple[str, ...], name: str) -> int:
    return names.index(name) if name in names else -1
