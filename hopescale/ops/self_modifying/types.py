"""What the fused self-modifying chunks are given and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hopescale.ops.delta_rule.types import Read


class Weights(NamedTuple):
    """Weights (or momenta) of the memories of a bank, one set per sequence. They act from the right: `x @ w_in`.

    Attributes:
        w_in: `[B, H, D, R]`, the matrices that read keys, side by side: vector memories, then gate memories.
        w_out_vector: Second layers of vector MLP memories `[B, H, Nw, E, D]`; None for linear memories.
        w_out_gate: Second layers of gate MLP memories `[B, H, Nn, E, 1]`; None if there are none.
    """

    w_in: Tensor
    w_out_vector: Tensor | None
    w_out_gate: Tensor | None

    def zeros_like(self) -> Weights:
        """Return zeros of the same shapes."""
        return Weights(*(None if part is None else torch.zeros_like(part) for part in self))


class Streams(NamedTuple):
    """What is known of a sequence before a memory is asked.

    Attributes:
        k: Inputs of keys `[B, H, T, D]`, of unit length. Gate memories are asked at them.
        v: Inputs of values, or the values themselves.
        q: Inputs of queries, or the queries themselves.
        eta: Logits of the inner learning rate `[B, H, T]`, without what a memory adds.
        alpha: The same of retention; None keeps everything.
        mu: The same of momentum, complete; None without momentum.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    eta: Tensor
    alpha: Tensor | None
    mu: Tensor | None


@dataclass(frozen=True)
class MemorySpec:
    """How a bank of memories reads and learns.

    Attributes:
        vector_memories: Names of the memories that answer with vectors: `mem`, then any of `k`, `v`, `q`, which make
            those.
        gate_memories: Names of those that answer with one number, `eta` or `alpha`.
        hidden: `E` of an MLP memory; None makes memories linear.
        chunk_size: Tokens of a chunk; gradients are taken at the weights it begins with.
        objective: Inner loss, as in `InnerLoss`.
        own_target: Whether a memory's target is its own answer to the value, not the value.
        erase: Whether a write first erases what its key reads.
        error_cap: Largest norm of a token's error; None is no limit.
        key_eps: Added to the squared length of a hidden activation before it is divided by its length.
        eta_max: Largest inner learning rate.
        read: Which state token t reads, as in `delta_rule`.
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


class ChunksOutput(NamedTuple):
    """What a run over a sequence returns.

    Attributes:
        y: Answers of `mem` to the queries `[B, H, T, D]`.
        stats: Inner learning rate, retention and norm of `mem`'s error `[B, H, T, 3]`, without a gradient.
        running: Weights after the last token.
        momentum: Their momentum; None without.
        boundary: Weights at the start of the last chunk.
    """

    y: Tensor
    stats: Tensor
    running: Weights
    momentum: Weights | None
    boundary: Weights
