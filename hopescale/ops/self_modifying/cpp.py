"""The chunks of a sequence as one differentiable operation, computed in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer, pointers
from hopescale.ops.limits import BLOCK
from hopescale.ops.self_modifying.types import (
    NO_WEIGHTS,
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)

_READS = ("prefix", "inclusive", "boundary")


class _MemorySpec(ctypes.Structure):
    """`MemorySpec` of memory_spec.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dim", "hidden", "vectors", "gates", "chunk")),
        *((f"of_{name}", ctypes.c_int32) for name in ("k", "v", "q", "eta", "alpha")),
        *((name, ctypes.c_int32) for name in ("retention", "momentum", "l2", "own_target", "erase", "read")),
        *((name, ctypes.c_float) for name in ("error_cap", "key_eps", "eta_max")),
    ]

    @classmethod
    def of(cls, spec: MemorySpec, streams: Streams) -> _MemorySpec:
        memories = {name: number for number, name in enumerate(spec.vector_memories + spec.gate_memories)}
        return cls(
            streams.k.shape[-1],
            spec.hidden or 0,
            len(spec.vector_memories),
            len(spec.gate_memories),
            min(spec.chunk_size, streams.k.shape[2]),
            *(memories.get(name, -1) for name in ("k", "v", "q", "eta", "alpha")),
            streams.alpha is not None,
            streams.mu is not None,
            spec.objective == "l2",
            spec.own_target,
            spec.erase,
            _READS.index(spec.read),
            spec.error_cap or 0.0,
            spec.key_eps,
            spec.eta_max,
        )


def _padded(width: int) -> int:
    return -(-width // BLOCK) * BLOCK


def _weights(rows: Tensor, spec: MemorySpec, dim: int) -> Weights:
    """View weights in rows of a state's numbers `[B, H, ...]`: what memory_spec.h calls a `State`."""
    if spec.hidden is None:
        columns = dim * len(spec.vector_memories) + len(spec.gate_memories)
        return Weights(rows.unflatten(-1, (dim, -1))[..., :columns], None, None)
    hidden, sizes = spec.hidden, (len(spec.vector_memories), len(spec.gate_memories))
    parts = rows.split([dim * hidden * sum(sizes), hidden * dim * sizes[0], hidden * BLOCK * sizes[1]], dim=-1)
    vector, gate = (
        part.unflatten(-1, (size, hidden, -1)) if size else None for part, size in zip(parts[1:], sizes, strict=True)
    )
    return Weights(parts[0].unflatten(-1, (dim, -1)), vector, None if gate is None else gate[..., :1])


def _put(rows: Tensor, weights: Weights, spec: MemorySpec, dim: int) -> None:
    for part, weight in zip(_weights(rows, spec, dim), weights, strict=True):
        if part is not None:
            part.copy_(weight)


def _require(has_memory: int, c: _MemorySpec) -> None:
    if not has_memory:
        raise MemoryError(
            f"the system grants no memory to compute memories of width {c.dim} in chunks of {c.chunk} tokens"
        )


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: MemorySpec, num_streams: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        streams = Streams(*tensors[:num_streams])
        weights, momentum = Weights(*tensors[num_streams:][:3]), Weights(*tensors[num_streams:][3:])
        batch, heads, tokens, dim = streams.k.shape
        native, c = library(), _MemorySpec.of(spec, streams)
        size = native.hopescale_state_size(ctypes.byref(c))
        slot = size * (2 if c.momentum else 1)
        chunk_states = streams.k.new_empty(batch, heads, -(-tokens // spec.chunk_size), slot)
        native.hopescale_use_huge_pages(pointer(chunk_states), ctypes.c_int64(4 * chunk_states.numel()))
        first_state = chunk_states[:, :, 0].zero_()
        _put(first_state[..., :size], weights, spec, dim)
        if c.momentum:
            _put(first_state[..., size:], momentum, spec, dim)
        last, y = chunk_states.new_empty(batch, heads, slot), torch.empty_like(streams.q)
        stats = chunk_states.new_empty(batch, heads, tokens, 3)
        inputs, outputs = pointers(streams), [pointer(x) for x in (chunk_states, last, y, stats)]

        def run(begin: int, end: int) -> None:
            _require(native.hopescale_forward(ctypes.byref(c), tokens, begin, end, inputs, *outputs), c)

        parallel_for(run, batch * heads)
        ctx.spec, ctx.size = spec, size
        ctx.save_for_backward(*streams, chunk_states)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        rows = [last[..., :size], last[..., size:] if c.momentum else None, chunk_states[:, :, -1, :size]]
        after = [
            None if part is None else part.clone()
            for x in rows
            for part in (NO_WEIGHTS if x is None else _weights(x, spec, dim))
        ]
        return y, stats, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, _: None, *d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, size = ctx.spec, ctx.size
        *streams, chunk_states = ctx.saved_tensors
        streams = Streams(*streams)
        batch, heads, tokens, dim = streams.k.shape
        native, c = library(), _MemorySpec.of(spec, streams)
        d_y = torch.zeros_like(streams.q) if d_y is None else d_y.contiguous()
        d_state = chunk_states.new_zeros(batch, heads, chunk_states.shape[-1])
        d_boundary = chunk_states.new_zeros(batch, heads, size) if any(x is not None for x in d_after[6:]) else None
        for rows, grads in (
            (d_state[..., :size], d_after[:3]),
            (d_state[..., size:], d_after[3:6]),
            (d_boundary, d_after[6:]),
        ):
            if rows is not None and rows.shape[-1]:
                for part, grad in zip(_weights(rows, spec, dim), grads, strict=True):
                    if grad is not None:
                        part.copy_(grad)
        d_streams = tuple(None if x is None else torch.empty_like(x) for x in streams)
        inputs, gradients = pointers(streams), pointers(d_streams)
        rest = [pointer(x) for x in (chunk_states, d_y, d_boundary, d_state)]

        def run(begin: int, end: int) -> None:
            _require(native.hopescale_backward(ctypes.byref(c), tokens, begin, end, inputs, *rest, gradients), c)

        parallel_for(run, batch * heads)
        d_weights = _weights(d_state[..., :size], spec, dim)
        d_momentum = _weights(d_state[..., size:], spec, dim) if c.momentum else (None, None, None)
        return None, None, *d_streams, *d_weights, *d_momentum


def self_modifying_cpp(streams: Streams, state: Memories, spec: MemorySpec) -> SelfModifyingOutput:
    """Run memories over a sequence that begins with a chunk, on a CPU in float32. As `self_modifying`."""
    inputs = Streams(*(None if x is None else x.contiguous() for x in streams))
    running, momentum, _ = state.memory
    y, stats, *after = _Chunks.apply(spec, len(inputs), *inputs, *running, *(momentum or NO_WEIGHTS))
    weights = [Weights(*after[n : n + 3]) for n in (0, 3, 6)]
    last = MemoryState(weights[0], weights[1] if momentum is not None else None, weights[2])
    return SelfModifyingOutput(y, stats, Memories(last, None))
