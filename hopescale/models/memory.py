"""Associative memories that share keys and gates: what they answer, what they write, how a chunk moves them.

Shapes here put heads before tokens: `[B, H, C, .]`, with `N` memories `[B, H, N, C, .]`. Vector memories answer with
vectors of the head dim `D`, gate memories with one number (gates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.ops.delta_rule import (
    Chunk,
    ChunkUpdate,
    DecayWeights,
    Move,
    Read,
    chunk_values,
    move_chunk,
    open_chunk,
    read_chunk,
    write_chunk,
)
from hopescale.ops.inner_gradient import InnerLoss, capped, mlp_writes
from hopescale.ops.limits import is_moved_by_map, is_trace_smaller
from hopescale.ops.self_modifying import Weights
from hopescale.parallel.layers import ParameterSpec, new_parameter

INITIAL_OUTPUT_STD = 0.1
KEY_EPS = 1e-2
"""Added to the squared length of a hidden activation before it is divided by its length: a memory that has been erased
answers with almost nothing, and its direction must not turn into a large gradient."""


@dataclass(frozen=True)
class WriteSpec:
    """How memories learn inside the sequence; the fields are those of `SelfModifyingConfig`."""

    targets: Literal["self", "value"]
    objective: Literal["l2", "dot"]
    erase: bool
    error_cap: float | None


class BankState(NamedTuple):
    """Weights after the last token, their momentum, and the weights at the start of the current chunk."""

    running: Weights
    momentum: Weights | None
    boundary: Weights

    def at_boundary(self) -> BankState:
        """Begin a chunk: gradients are taken at the present weights from now on."""
        return self._replace(boundary=self.running)


class Writes(NamedTuple):
    """Keys and write values of one chunk (DGD layer by layer; Nested Learning, section 4.5 and Eq. 93).

    Attributes:
        key: Key of the first layers `[B, H, C, D]`.
        first: Write values of the first layers `[B, H, C, R]`.
        vector: Keys of unit length or less `[B, H, Nw, C, E]` and values `[B, H, Nw, C, D]` of second layers of vector
            memories; None for linear memories.
        gate: The same for gate memories, values `[B, H, Nn, C, 1]`; None if there are none.
        surprise: Norm of each token's error in each vector memory `[B, H, Nw, C]`; None if there are none.
    """

    key: Tensor
    first: Tensor
    vector: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    surprise: Tensor | None


_ABSENT = Weights(None, None, None)


class LayerResult(NamedTuple):
    """A layer after a chunk: its weight, and its momentum if it has one."""

    weight: Tensor
    momentum: Tensor | None

    def add(self, weight: Tensor, momentum: Tensor | None) -> LayerResult:
        """Do what `ChunkUpdate.add` does, whatever was before."""
        return self


class Trace(NamedTuple):
    """What a chunk did to the layers of a bank; of a layer where that has more entries, what it made of it."""

    first: ChunkUpdate | Move | LayerResult
    vector: ChunkUpdate | Move | LayerResult | None
    gate: ChunkUpdate | Move | LayerResult | None

    @classmethod
    def of_state(cls, state: BankState) -> Trace:
        """Return the trace that ends in a state."""
        layers = zip(state.running, state.momentum or _ABSENT, strict=True)
        return cls(*(None if weight is None else LayerResult(weight, momentum) for weight, momentum in layers))

    def add(self, state: BankState) -> BankState:
        """Return the state after the chunk, from that before it."""
        layers = zip(self, state.running, state.momentum or _ABSENT, strict=True)
        after = [(None, None) if part is None else part.add(weight, momentum) for part, weight, momentum in layers]
        running, pushed = (Weights(*parts) for parts in zip(*after, strict=True))
        return BankState(running, pushed if state.momentum else None, state.boundary)


class InitialMemory(nn.Module):
    """Learned initial state of one memory, one per head: `w` if linear, `w2` then `w1` if an MLP."""

    def __init__(self, num_heads: int, size_in: int, size_out: int, hidden: int | None):
        super().__init__()
        shared = {"partition_dim": 0, "keep_fp32": True}
        output_std, rows = INITIAL_OUTPUT_STD / (hidden or size_in) ** 0.5, "one" if size_out == 1 else "head"
        if hidden is None:
            spec = ParameterSpec(std=output_std, identity=size_out == size_in, sizes=(rows, "head"), **shared)
            self.w = new_parameter(num_heads, size_out, size_in, spec=spec)
        else:
            first = ParameterSpec(std=2 * hidden**-0.5, sizes=("memory", "head"), **shared)
            second = ParameterSpec(std=output_std, sizes=(rows, "memory"), **shared)
            self.w2 = new_parameter(num_heads, hidden, size_in, spec=first)
            self.w1 = new_parameter(num_heads, size_out, hidden, spec=second)


class MemoryBank(nn.Module):
    """Memories of one mixer that are written at the same boundaries.

    Args:
        vector_memories: Names of the memories that answer with vectors; the one called `mem` comes first.
        gate_memories: Names of those that answer with one number.
        num_heads: Heads of this rank.
        head_dim: `D`.
        hidden: `E` of an MLP memory; None makes memories linear.
        spec: How they learn.
    """

    def __init__(
        self,
        vector_memories: tuple[str, ...],
        gate_memories: tuple[str, ...],
        *,
        num_heads: int,
        head_dim: int,
        hidden: int | None,
        spec: WriteSpec,
    ):
        super().__init__()
        self.vector_memories, self.gate_memories = vector_memories, gate_memories
        self.hidden, self.spec = hidden, spec
        self.rows = hidden or head_dim
        for name in vector_memories + gate_memories:
            self.add_module(
                name, InitialMemory(num_heads, head_dim, head_dim if name in vector_memories else 1, hidden)
            )

    def initial_state(self, batch: int, momentum: bool) -> BankState:
        """Expand the learned initial weights to `batch` sequences."""

        def stack(names: tuple[str, ...]) -> Tensor | None:
            if not names or self.hidden is None:
                return None
            return self._expand(torch.stack([getattr(self, name).w1 for name in names], dim=1), batch)

        key = "w" if self.hidden is None else "w2"
        first = torch.cat(
            [getattr(getattr(self, name), key) for name in self.vector_memories + self.gate_memories], dim=1
        )
        weights = Weights(self._expand(first, batch), stack(self.vector_memories), stack(self.gate_memories))
        return BankState(weights, weights.zeros_like() if momentum else None, weights)

    @staticmethod
    def _expand(x: Tensor, batch: int) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        return x.mT.to(kind).expand(batch, *x.shape[:-2], *x.mT.shape[-2:]).contiguous()

    def retrieve(self, weights: Weights, inputs: dict[str, Tensor], gate_input: Tensor) -> dict[str, Tensor]:
        """Ask memories with fixed weights: `M(x)`, each with its own input.

        Args:
            weights: Of all memories of the bank.
            inputs: Input `[B, H, C, D]` of each vector memory that is asked.
            gate_input: Input of all gate memories `[B, H, C, D]`.

        Returns:
            Answers by name: `[B, H, C, D]` of vector memories, `[B, H, C]` of gate memories.
        """
        answers = {}
        for index, name in enumerate(self.vector_memories):
            if name in inputs:
                pre = inputs[name] @ weights.w_in[..., index * self.rows : (index + 1) * self.rows]
                if self.hidden is not None:
                    pre = inputs[name] + F.silu(pre) @ weights.w_out_vector[:, :, index]
                answers[name] = pre
        if self.gate_memories:
            logits = (gate_input @ weights.w_in[..., len(self.vector_memories) * self.rows :]).unflatten(
                -1, (len(self.gate_memories), -1)
            )
            if self.hidden is not None:
                logits = (F.silu(logits) * weights.w_out_gate[:, :, None, ..., 0]).sum(-1, keepdim=True)
            answers |= dict(zip(self.gate_memories, logits[..., 0].unbind(-1), strict=True))
        return answers

    def writes(self, boundary: Weights, k: Tensor, v: Tensor, mu: Tensor | None) -> Writes:
        """Compute what every memory writes for keys `k` and values `v`, `[B, H, C, D]`, at the boundary weights.

        With momentum `mu` `[B, H, C]` a write enters by `1 - mu` of its size, so that all it pushes adds up to one
        write. Gradients of a chunk are taken at its boundary: were they amplified by `1 / (1 - mu)`, a key that comes
        back in every chunk would overshoot its target further each time.
        """
        fresh = None if mu is None else 1 - mu
        inputs = torch.cat([k, v], dim=2) if self.spec.targets == "self" else k
        pre = inputs @ boundary.w_in
        if self.hidden is None:
            return self._linear_writes(pre, k, v, fresh)
        loss = InnerLoss(self.spec.objective, self.spec.targets == "self", self.spec.error_cap, KEY_EPS)
        parts = pre.split([len(names) * self.rows for names in (self.vector_memories, self.gate_memories)], dim=-1)
        groups = zip(parts, (boundary.w_out_vector, boundary.w_out_gate), ((k, v), None), strict=True)
        vector, gate = (
            None if w1 is None else mlp_writes(part, w1, residual=residual, fresh=fresh, loss=loss)
            for part, w1, residual in groups
        )
        first = [layer_writes.first for layer_writes in (vector, gate) if layer_writes is not None]
        pairs = (
            None if layer_writes is None else (layer_writes.keys, layer_writes.values)
            for layer_writes in (vector, gate)
        )
        surprise = None if vector is None else vector.surprise
        return Writes(k, first[0] if len(first) == 1 else torch.cat(first, dim=-1), *pairs, surprise)

    def _linear_writes(self, answers: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None) -> Writes:
        """Do the same for linear memories, from their answers to keys and, if these are the targets, to values."""
        tokens, cut = k.shape[2], len(self.vector_memories) * self.rows
        target = (
            answers[..., tokens:, :] if self.spec.targets == "self" else v.repeat(1, 1, 1, len(self.vector_memories))
        )
        error = answers[..., :tokens, :] - target if self.spec.objective == "l2" else -target
        if self.spec.error_cap is not None:
            vector = capped(
                error[..., :cut].unflatten(-1, (len(self.vector_memories), self.rows)), self.spec.error_cap
            ).flatten(-2)
            error = torch.cat([vector, capped(error[..., cut:, None], self.spec.error_cap)[..., 0]], dim=-1)
        surprise = None
        if self.vector_memories:
            surprise = error.detach()[..., :cut].unflatten(-1, (-1, self.rows)).norm(dim=-1).transpose(2, 3)
        return Writes(k, -error if fresh is None else error * -fresh[..., None], None, None, surprise)

    def advance(
        self, state: BankState, writes: Writes, decay: DecayWeights, q: Tensor | None, read: Read
    ) -> tuple[Tensor | None, BankState, Trace]:
        """Move all memories over one chunk, and read the first vector memory with `q` `[B, H, C, D]` on the way.

        Returns:
            The answers to `q`, `[B, H, C, D]` (None without `q`), the state after the chunk, and what led there.
        """
        per_memory = decay.map(lambda table: table.unsqueeze(2))
        pairs = ((writes.key, writes.first), writes.vector, writes.gate)
        layers = [
            None if pair is None else _ChunkLayer.open(table, *pair, weight, push, self.spec.erase)
            for table, pair, weight, push in zip(
                (decay, per_memory, per_memory), pairs, state.running, state.momentum or _ABSENT, strict=True
            )
        ]
        after = [(None, None) if layer is None else layer.after() for layer in layers]
        results, traces = (Trace(*parts) for parts in zip(*after, strict=True))
        output = None if q is None else self._read(state.boundary, layers, q, read)
        return output, results.add(state), traces

    def _read(self, boundary: Weights, layers: list[_ChunkLayer | None], q: Tensor, read: Read) -> Tensor:
        """Read the first vector memory. Two reads in a row make an MLP's."""
        if read == "boundary":
            return self.retrieve(boundary, {self.vector_memories[0]: q}, q)[self.vector_memories[0]]
        first, second, _ = layers
        inner = first.columns(self.rows).read(q, read)
        return inner if second is None else q + second.memory(0).read(F.silu(inner), read)


class _ChunkLayer(NamedTuple):
    """One linear layer during one chunk: its keys, and what is written."""

    chunk: Chunk
    values: Tensor
    weight: Tensor
    momentum: Tensor | None

    @classmethod
    def open(
        cls, decay: DecayWeights, keys: Tensor, values: Tensor, weight: Tensor, momentum: Tensor | None, erase: bool
    ) -> _ChunkLayer:
        return cls(open_chunk(decay, keys, erase=erase), values, weight, momentum)

    def after(self) -> tuple[LayerResult, ChunkUpdate | Move | LayerResult]:
        """Return the layer after the chunk, and its part of the `Trace`."""
        sizes, momentum = (*self.chunk.k.shape[-2:], self.values.shape[-1]), self.momentum is not None
        if is_moved_by_map(*sizes, momentum=momentum):
            entry = move_chunk(self.chunk, self.values)
        else:
            entry = write_chunk(self.chunk, chunk_values(self.chunk, self.values, self.weight, self.momentum))
        result = LayerResult(*entry.add(self.weight, self.momentum))
        smaller = is_trace_smaller(*sizes, momentum=momentum, erase=self.chunk.erased is not None)
        return result, entry if smaller else result

    def read(self, q: Tensor, read: Read) -> Tensor:
        values = chunk_values(self.chunk, self.values, self.weight, self.momentum)
        return read_chunk(self.chunk, q, values, self.weight, self.momentum, read)

    def columns(self, stop: int) -> _ChunkLayer:
        """Keep the first `stop` outputs of layers side by side."""
        momentum = None if self.momentum is None else self.momentum[..., :stop]
        return self._replace(values=self.values[..., :stop], weight=self.weight[..., :stop], momentum=momentum)

    def memory(self, index: int) -> _ChunkLayer:
        """Keep one of the memories of `[B, H, N, ...]`; tables are shared along that dimension."""
        decay = self.chunk.decay.map(lambda table: table[:, :, 0])
        chunk = Chunk(decay, *(None if part is None else part[:, :, index] for part in self.chunk[1:]))
        return _ChunkLayer(chunk, *(None if part is None else part[:, :, index] for part in self[1:]))
