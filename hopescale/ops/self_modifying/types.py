"""Arguments and results of the self-modifying operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hopescale.ops.backends import MemoryShape
from hopescale.ops.delta_rule.types import Read
from hopescale.ops.limits import is_sequential

KEY_EPS = 1e-2
"""Added to the squared length of a hidden activation before it is divided by its length: a memory that has been erased
answers with almost nothing, and its direction must not turn into a large gradient."""


class Weights(NamedTuple):
    """Weights (or momenta) of the memories of a bank, one set per sequence. They act from the right: `x @ w_in`.

    Attributes:
        w_in: Matrices that read keys, side by side: those of vector memories, then of gate memories. `[B, H, D, R]`.
        w_out_vector: Second layers of vector MLP memories `[B, H, Nv, E, D]`; None for linear memories.
        w_out_gate: Second layers of gate MLP memories `[B, H, Ng, E, 1]`; None if there are none.
    """

    w_in: Tensor
    w_out_vector: Tensor | None
    w_out_gate: Tensor | None

    FILE_KEYS = ("first", "wide", "narrow")

    def zeros_like(self) -> Weights:
        """Return zeros of the same shapes."""
        return Weights(*(None if part is None else torch.zeros_like(part) for part in self))


NO_WEIGHTS = Weights(None, None, None)


class MemoryState(NamedTuple):
    """Weights after the last token, their momentum, and the weights at the start of the current chunk."""

    running: Weights
    momentum: Weights | None
    boundary: Weights

    def at_boundary(self) -> MemoryState:
        """Begin a chunk: gradients are taken at the present weights from now on."""
        return self._replace(boundary=self.running)


class Memories(NamedTuple):
    """All memories of a mixer: one bank, or two if `mem` has boundaries of its own.

    Attributes:
        memory: Bank of the memory called `mem`.
        projection: Bank of the others; None if they lie in the same one.
    """

    memory: MemoryState
    projection: MemoryState | None

    def at_boundary(self) -> Memories:
        """Begin a chunk in all banks."""
        return Memories(*(None if bank is None else bank.at_boundary() for bank in self))

    def expand(self, batch: int) -> Memories:
        """View memories for a batch of one as those of `batch` sequences."""
        return tree_map(lambda x: None if x is None else x.expand(batch, *x.shape[1:]), self)

    def split(self, sizes: Sequence[int]) -> list[Memories]:
        """Cut the batch into parts of these sizes."""
        leaves, tree = tree_flatten(self)
        parts = ([None] * len(sizes) if x is None else x.split(list(sizes)) for x in leaves)
        return [tree_unflatten(part, tree) for part in zip(*parts, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Memories]) -> Memories:
        """Join batches."""
        leaves = zip(*(tree_flatten(part)[0] for part in parts), strict=True)
        joined = [None if each[0] is None else torch.cat(each) for each in leaves]
        return tree_unflatten(joined, tree_flatten(parts[0])[1])


class Streams(NamedTuple):
    """Inputs of a sequence before a memory is read; `make_inputs` makes keys, values and gates of them.

    Attributes:
        k: Inputs of keys `[B, H, T, D]`, of unit length, at which gate memories are read; then the keys.
        v: Inputs of values, or the values themselves.
        q: Inputs of queries, or the queries themselves.
        eta: Logits of the inner learning rate `[B, H, T]`, without the addition of a memory; then the rate.
        alpha: Logits of retention, None keeps everything; then the retention.
        mu: Logits of momentum, complete; then the momentum. None without momentum.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    eta: Tensor
    alpha: Tensor | None
    mu: Tensor | None

    def split(self, sizes: list[int]) -> Iterator[Streams]:
        """Cut the tokens into parts of these sizes."""
        parts = (repeat(None) if x is None else x.split(sizes, dim=2) for x in self)
        return (Streams(*part) for _, *part in zip(sizes, *parts, strict=False))


@dataclass(frozen=True)
class MemorySpec:
    """How memories read and learn.

    Attributes:
        vector_memories: Names of the memories that answer with vectors: `mem`, then any of `k`, `v`, `q`, which make
            those.
        gate_memories: Names of those that answer with one number, `eta` or `alpha`.
        hidden: `E` of an MLP memory; None makes memories linear.
        chunk_size: Tokens of a chunk; gradients are taken at the weights it begins with.
        objective: Inner loss: `l2`, half the squared error; `dot`, minus the inner product of answer and target.
        own_target: Whether a memory's target is its own answer to the value, not the value.
        erase: Whether a write first erases the memory's present answer to its key.
        error_cap: Largest norm of a token's error; None is no limit.
        key_eps: Number added to the squared length of a hidden activation before it is divided by its length.
        eta_max: Largest inner learning rate.
        read: State that token t reads, as in `delta_rule`.
        projection_chunk_size: Tokens of a chunk of all memories but `mem`, a multiple of `chunk_size`; None is that.
        momentum_write: Part of a write that enters the momentum: `averaged`, `1 - mu` of it, or `whole`.
        normalize_writes: Whether a write of an MLP memory is divided by the square of what its layer amplifies an error
            by, where that is above 1; see `mlp_writes`.
    """

    vector_memories: tuple[str, ...]
    gate_memories: tuple[str, ...]
    hidden: int | None
    chunk_size: int
    objective: Literal["l2", "dot"]
    own_target: bool
    erase: bool
    error_cap: float | None
    key_eps: float
    eta_max: float
    read: Read
    projection_chunk_size: int | None = None
    momentum_write: Literal["averaged", "whole"] = "averaged"
    normalize_writes: bool = False

    @property
    def is_sequential(self) -> bool:
        """Whether chunks follow one another, because their writes depend on the contents of memories."""
        adaptive = len(self.vector_memories) > 1 or bool(self.gate_memories)
        inner = {"objective": self.objective, "own_target": self.own_target, "read": self.read}
        return is_sequential(adaptive=adaptive, linear=self.hidden is None, **inner)

    def entering(self, mu: Tensor | None) -> Tensor | None:
        """Return the factor on writes that goes with momentum `mu` `[B, H, T]`; None is 1."""
        return None if mu is None or self.momentum_write == "whole" else 1 - mu

    @property
    def banks(self) -> tuple[MemorySpec, MemorySpec | None]:
        """The memories by bank, as in `Memories`."""
        if self.projection_chunk_size in (None, self.chunk_size):
            return self, None
        main = replace(self, vector_memories=self.vector_memories[:1], gate_memories=())
        return main, replace(self, vector_memories=self.vector_memories[1:], chunk_size=self.projection_chunk_size)

    def shape(self, head_dim: int) -> MemoryShape:
        """Return the facts that decide which code can run the memories."""
        sizes = (self.chunk_size, self.projection_chunk_size or self.chunk_size)
        return MemoryShape(head_dim, self.hidden, *sizes, self.is_sequential)


class SelfModifyingOutput(NamedTuple):
    """Result of a run over a sequence.

    Attributes:
        y: Answers of `mem` to the queries `[B, H, T, D]`.
        stats: Inner learning rate, retention and norm of `mem`'s error `[B, H, T, 3]`, without a gradient.
        state: Memories after the last token.
    """

    y: Tensor
    stats: Tensor
    state: Memories
