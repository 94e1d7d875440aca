"""The chunks of sequences, or of the documents in them, as one differentiable operation, computed in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer, pointers
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.packed import run_packed
from hopescale.ops.self_modifying.types import Memories, MemorySpec, SelfModifyingOutput, Streams

_READS = ("prefix", "inclusive", "boundary")

GROUP = 512
"""Tokens of which the documents that begin in them are run one after the other, each head on one thread: gradients of
the state that all documents share are added up in one order, however many threads there are."""


class CMemorySpec(ctypes.Structure):
    """`MemorySpec` of memory_spec.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dim", "hidden", "vectors", "gates", "chunk")),
        *((f"of_{name}", ctypes.c_int32) for name in ("k", "v", "q", "eta", "alpha")),
        *(
            (name, ctypes.c_int32)
            for name in ("retention", "momentum", "averaged", "normalized", "l2", "own_target", "erase", "read")
        ),
        *((name, ctypes.c_float) for name in ("error_cap", "key_eps", "eta_max")),
    ]

    @classmethod
    def of(cls, spec: MemorySpec, streams: Streams) -> CMemorySpec:
        """Describe the memories of a bank, for calls with these streams."""
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
            streams.mu is not None and spec.momentum_write == "averaged",
            spec.normalize_writes,
            spec.objective == "l2",
            spec.own_target,
            spec.erase,
            _READS.index(spec.read),
            spec.error_cap or 0.0,
            spec.key_eps,
            spec.eta_max,
        )


class CBatch(ctypes.Structure):
    """`Batch` of batch.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("tokens", "heads", "documents", "shared", "group", "groups")),
        ("bounds", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, streams: Streams, offsets: Tensor, shared: bool) -> CBatch:
        """Describe the documents that lie between `offsets`, int64, which must outlive the result."""
        batch, heads, tokens, _ = streams.k.shape
        group = GROUP if shared else tokens
        return cls(tokens, heads, len(offsets) - 1, shared, group, -(-batch * tokens // group), offsets.data_ptr())


def require(has_memory: int, c: CMemorySpec) -> None:
    """Raise MemoryError if the system has granted no memory."""
    if not has_memory:
        raise MemoryError(
            f"the system grants no memory to compute memories of width {c.dim} in chunks of {c.chunk} tokens"
        )


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: MemorySpec, documents: Documents | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        *streams, running, momentum = tensors
        streams = Streams(*streams)
        batch, heads, tokens, _ = streams.k.shape
        offsets = (documents or Documents.whole(batch, tokens, streams.k.device)).offsets
        native, c = library(), CMemorySpec.of(spec, streams)
        layout = CBatch.of(streams, offsets, shared=documents is not None)
        given = torch.cat([part for part in (running, momentum) if part is not None], dim=-1)
        kept = given.new_empty(heads, batch * tokens // c.chunk, given.shape[-1])
        native.hopescale_use_huge_pages(pointer(kept), ctypes.c_int64(4 * kept.numel()))
        last, boundary = given.new_empty(batch, *given.shape[1:]), running.new_empty(batch, *running.shape[1:])
        y, stats = torch.empty_like(streams.q), given.new_empty(batch, heads, tokens, 3)
        inputs, rest = pointers(streams), [pointer(x) for x in (given, kept, last, boundary, y, stats)]

        def run(begin: int, end: int) -> None:
            done = native.hopescale_forward(ctypes.byref(c), ctypes.byref(layout), begin, end, inputs, *rest)
            require(done, c)

        parallel_for(run, heads * layout.groups)
        ctx.spec, ctx.size, ctx.shared = spec, running.shape[-1], documents is not None
        ctx.save_for_backward(*streams, offsets, given, kept)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        last_momentum = last[..., ctx.size :].clone() if c.momentum else None
        return y, stats, last[..., : ctx.size].clone(), last_momentum, boundary

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_y: Tensor | None, _: None, d_last: Tensor | None, d_momentum: Tensor | None, d_start: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        size = ctx.size
        *streams, offsets, given, kept = ctx.saved_tensors
        streams = Streams(*streams)
        batch, heads, _, _ = streams.k.shape
        native, c = library(), CMemorySpec.of(ctx.spec, streams)
        layout = CBatch.of(streams, offsets, ctx.shared)
        d_y = torch.zeros_like(streams.q) if d_y is None else d_y.contiguous()
        d_state = given.new_zeros(batch, heads, given.shape[-1])
        if d_last is not None:
            d_state[..., :size] = d_last
        if d_momentum is not None:
            d_state[..., size:] = d_momentum
        d_start = None if d_start is None else d_start.contiguous()
        d_given = given.new_zeros(layout.groups, heads, given.shape[-1])
        d_streams = tuple(None if x is None else torch.empty_like(x) for x in streams)
        inputs, gradients = pointers(streams), pointers(d_streams)
        rest = [pointer(x) for x in (given, kept, d_y, d_state, d_start, d_given)]

        def run(begin: int, end: int) -> None:
            where = ctypes.byref(c), ctypes.byref(layout), begin, end
            require(native.hopescale_backward(*where, inputs, *rest, gradients), c)

        parallel_for(run, heads * layout.groups)
        d_given = d_given.sum(0, keepdim=True) if ctx.shared else d_given
        return None, None, *d_streams, d_given[..., :size], d_given[..., size:] if c.momentum else None


def self_modifying_cpp(
    streams: Streams, state: Memories, spec: MemorySpec, documents: Documents | None = None
) -> SelfModifyingOutput:
    """Run memories over sequences that begin with a chunk, on a CPU in float32. As `self_modifying`."""
    return run_packed(_Chunks.apply, streams, state, spec, documents, share=True)
