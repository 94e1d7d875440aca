"""A chunk's writes and reads: it moves the memories of a bank. Shapes as in `memories.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.delta_rule import Read
from hopescale.ops.delta_rule.chunked import (
    Chunk,
    ChunkUpdate,
    Move,
    chunk_values,
    move_chunk,
    open_chunk,
    read_chunk,
    write_chunk,
)
from hopescale.ops.delta_rule.decay import DecayWeights
from hopescale.ops.limits import is_moved_by_map, is_trace_smaller
from hopescale.ops.self_modifying.memories import Writes, retrieve
from hopescale.ops.self_modifying.types import NO_WEIGHTS, MemorySpec, MemoryState, Weights


class LayerResult(NamedTuple):
    """A layer after a chunk: its weight, and its momentum if it has one."""

    weight: Tensor
    momentum: Tensor | None

    def add(self, weight: Tensor, momentum: Tensor | None) -> LayerResult:
        """Add to a state as `ChunkUpdate.add` does, in either form of the effect."""
        return self


class Trace(NamedTuple):
    """Effect of a chunk on the layers of a bank; for a layer with fewer entries than its effect, the layer after it."""

    w_in: ChunkUpdate | Move | LayerResult
    w_out_vector: ChunkUpdate | Move | LayerResult | None
    w_out_gate: ChunkUpdate | Move | LayerResult | None

    @classmethod
    def of_state(cls, state: MemoryState) -> Trace:
        """Return the trace that ends in a state."""
        layers = zip(state.running, state.momentum or NO_WEIGHTS, strict=True)
        return cls(*(None if weight is None else LayerResult(weight, momentum) for weight, momentum in layers))

    def add(self, state: MemoryState) -> MemoryState:
        """Return the state after the chunk, from that before it."""
        layers = zip(self, state.running, state.momentum or NO_WEIGHTS, strict=True)
        after = [(None, None) if part is None else part.add(weight, momentum) for part, weight, momentum in layers]
        running, pushed = (Weights(*parts) for parts in zip(*after, strict=True))
        return MemoryState(running, pushed if state.momentum else None, state.boundary)


def advance(
    spec: MemorySpec, state: MemoryState, writes: Writes, decay: DecayWeights, q: Tensor | None
) -> tuple[Tensor | None, MemoryState, Trace]:
    """Move all memories of a bank over one chunk, and read the first one with `q` `[B, H, C, D]` on the way.

    Returns:
        The answers to `q`, `[B, H, C, D]` (None without `q`), the state after the chunk, and what led there.
    """
    per_memory = decay.map(lambda table: table.unsqueeze(2))
    pairs = ((writes.key, writes.first), writes.vector, writes.gate)
    layers = [
        None if pair is None else _ChunkLayer.open(table, *pair, weight, push, spec.erase)
        for table, pair, weight, push in zip(
            (decay, per_memory, per_memory), pairs, state.running, state.momentum or NO_WEIGHTS, strict=True
        )
    ]
    after = [(None, None) if layer is None else layer.after() for layer in layers]
    results, traces = (Trace(*parts) for parts in zip(*after, strict=True))
    output = None if q is None else _read(spec, state.boundary, layers, q)
    return output, results.add(state), traces


def _read(spec: MemorySpec, boundary: Weights, layers: list[_ChunkLayer | None], q: Tensor) -> Tensor:
    """Read the first vector memory. Two reads in a row make an MLP's."""
    if spec.read == "boundary":
        return retrieve(spec, boundary, {spec.vector_memories[0]: q}, q)[spec.vector_memories[0]]
    first, second, _ = layers
    inner = first.columns(spec.hidden or q.shape[-1]).read(q, spec.read)
    return inner if second is None else q + second.memory(0).read(F.silu(inner), spec.read)


class _ChunkLayer(NamedTuple):
    """One linear layer during one chunk: its keys and its writes."""

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
