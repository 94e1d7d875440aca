"""The chunks of a sequence as one differentiable operation, computed in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer, pointers
from hopescale.ops.self_modifying.packed import run_packed
from hopescale.ops.self_modifying.types import Memories, MemorySpec, SelfModifyingOutput, Streams

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


def _require(has_memory: int, c: _MemorySpec) -> None:
    if not has_memory:
        raise MemoryError(
            f"the system grants no memory to compute memories of width {c.dim} in chunks of {c.chunk} tokens"
        )


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: MemorySpec, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        *streams, running, momentum = tensors
        streams = Streams(*streams)
        batch, heads, tokens, dim = streams.k.shape
        native, c = library(), _MemorySpec.of(spec, streams)
        size = native.hopescale_state_size(ctypes.byref(c))
        slot = size * (2 if c.momentum else 1)
        chunk_states = streams.k.new_empty(batch, heads, -(-tokens // spec.chunk_size), slot)
        native.hopescale_use_huge_pages(pointer(chunk_states), ctypes.c_int64(4 * chunk_states.numel()))
        chunk_states[:, :, 0, :size] = running
        if c.momentum:
            chunk_states[:, :, 0, size:] = momentum
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
        last_momentum = last[..., size:].clone() if c.momentum else None
        return y, stats, last[..., :size].clone(), last_momentum, chunk_states[:, :, -1, :size].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_y: Tensor | None, _: None, d_last: Tensor | None, d_momentum: Tensor | None, d_start: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        spec, size = ctx.spec, ctx.size
        *streams, chunk_states = ctx.saved_tensors
        streams = Streams(*streams)
        batch, heads, tokens, _ = streams.k.shape
        native, c = library(), _MemorySpec.of(spec, streams)
        d_y = torch.zeros_like(streams.q) if d_y is None else d_y.contiguous()
        d_state = chunk_states.new_zeros(batch, heads, chunk_states.shape[-1])
        if d_last is not None:
            d_state[..., :size] = d_last
        if d_momentum is not None:
            d_state[..., size:] = d_momentum
        d_start = None if d_start is None else d_start.contiguous()
        d_streams = tuple(None if x is None else torch.empty_like(x) for x in streams)
        inputs, gradients = pointers(streams), pointers(d_streams)
        rest = [pointer(x) for x in (chunk_states, d_y, d_start, d_state)]

        def run(begin: int, end: int) -> None:
            _require(native.hopescale_backward(ctypes.byref(c), tokens, begin, end, inputs, *rest, gradients), c)

        parallel_for(run, batch * heads)
        return None, *d_streams, d_state[..., :size], d_state[..., size:] if c.momentum else None


def self_modifying_cpp(streams: Streams, state: Memories, spec: MemorySpec) -> SelfModifyingOutput:
    """Run memories over a sequence that begins with a chunk, on a CPU in float32. As `self_modifying`."""
    return run_packed(_Chunks, streams, state, spec, share=True)
