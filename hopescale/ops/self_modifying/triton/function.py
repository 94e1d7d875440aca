"""The fused chunks as one differentiable operation: what is kept, and which kernel runs on what."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.packed import run_packed
from hopescale.ops.self_modifying.triton import scratch
from hopescale.ops.self_modifying.triton.backward import self_modify_back_kernel
from hopescale.ops.self_modifying.triton.forward import self_modify_kernel
from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig
from hopescale.ops.self_modifying.types import Memories, MemorySpec, SelfModifyingOutput, Streams

MOST_PROGRAMS = 4096
"""Programs of a launch, at most: each has scratch memory of its own."""


class _Places(NamedTuple):
    """Where documents lie, and what is kept of them.

    Attributes:
        offsets: Bounds of the documents, on the device, as in `Documents`.
        shared: Whether all begin with one state, and not each row with its own.
        last: Number of each row's last document.
        ends: Place of the state after it, among those kept of a head.
        cut: Whether it has several chunks.
        slots: Number of states that are kept of a head.
    """

    offsets: Tensor
    shared: bool
    last: list[int]
    ends: list[int]
    cut: list[bool]
    slots: int

    @classmethod
    def of(cls, k: Tensor, documents: Documents | None, chunk_size: int) -> _Places:
        batch, _, tokens, _ = k.shape
        shared, documents = documents is not None, documents or Documents.whole(batch, tokens, k.device)
        chunks = [-(-length // chunk_size) for length in documents.lengths]
        last = documents.last
        ends = [documents.bounds[number] // chunk_size + number + chunks[number] - 1 for number in last]
        slots = documents.bounds[-1] // chunk_size + len(chunks)
        return cls(documents.offsets, shared, last, ends, [chunks[number] > 1 for number in last], slots)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def place(self, x: Tensor | None) -> Tensor | None:
        """Return what is given for each row `[B, ...]` at its last document, and zeros at all others `[N, ...]`."""
        if x is None:
            return None
        placed = x.new_zeros(self.documents, *x.shape[1:])
        for row, number in enumerate(self.last):
            placed[number] = x[row]
        return placed


def _run(
    kernel: triton.JITFunction,
    config: KernelConfig,
    places: _Places,
    chunk_size: int,
    matrices: int,
    k: Tensor,
    *tensors: Tensor | None,
) -> None:
    """Run a kernel on every head of every document, with memory for that many matrices of a chunk's tokens."""
    _, heads, tokens, _ = k.shape
    size = scratch.ROWS.value * config.rows + scratch.TABLES.value * config.rows**2 + matrices * config.matrix
    programs = places.documents * heads
    space = k.new_empty(min(programs, MOST_PROGRAMS), size)
    sizes = (heads, 0 if places.shared else heads, tokens, chunk_size, places.slots, size)
    with torch.cuda.device_of(k):
        for begin in range(0, programs, MOST_PROGRAMS):
            grid, how = (min(programs - begin, MOST_PROGRAMS),), {"num_warps": config.warps, "num_stages": 1}
            kernel[grid](k, *tensors, space, places.offsets, begin, *sizes, CONFIG=config, **how)


class _SelfModify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, spec: MemorySpec, documents: Documents | None, k, v, q, eta, alpha, mu, running, momentum
    ):
        streams, chunk_size = Streams(k, v, q, eta, alpha, mu), spec.chunk_size
        config, places = KernelConfig.of(streams, spec), _Places.of(k, documents, chunk_size)
        states = running.new_empty(k.shape[1], places.slots, config.size)
        momenta = None if momentum is None else torch.empty_like(states)
        y, stats = torch.empty_like(q), q.new_empty(*q.shape[:3], 3)
        tensors = (*streams, running, momentum, states, momenta)
        _run(self_modify_kernel, config, places, chunk_size, scratch.FORWARD_MATRICES.value, *tensors, y, stats)
        ctx.config, ctx.places, ctx.chunk_size = config, places._replace(offsets=None), chunk_size
        ctx.save_for_backward(places.offsets, *tensors)
        ctx.mark_non_differentiable(stats)
        last, last_momentum = (
            None if x is None else torch.stack([x[:, end] for end in places.ends]) for x in (states, momenta)
        )
        first = running.expand(len(k), -1, -1)
        boundary = [
            states[:, end - 1] if cut else first[row]
            for row, (end, cut) in enumerate(zip(places.ends, places.cut, strict=True))
        ]
        return y, stats, last, last_momentum, torch.stack(boundary)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_y: Tensor, _: None, d_last: Tensor, d_last_momentum: Tensor | None, d_start: Tensor
    ):
        config: KernelConfig = ctx.config
        offsets, *tensors = ctx.saved_tensors
        *streams, _, _, states, momenta = tensors
        places: _Places = ctx.places._replace(offsets=offsets)
        programs = places.documents, states.shape[0]
        pieces = -(-min(ctx.chunk_size, d_y.shape[2]) // config.rows)
        replayed = states.new_empty(*programs, pieces - 1, config.size)
        replayed_momenta = None if momenta is None else torch.empty_like(replayed)
        # The kernel changes these in place.
        weights = [places.place(x) for x in (d_last, d_last_momentum, d_start)]
        gradients = [None if x is None else torch.empty_like(x) for x in streams]
        tensors = (*tensors, replayed, replayed_momenta, d_y.contiguous(), *weights, *gradients)
        _run(self_modify_back_kernel, config, places, ctx.chunk_size, scratch.BACKWARD_MATRICES.value, *tensors)
        if places.shared:
            weights = [None if x is None else x.sum(0, keepdim=True) for x in weights]
        return None, None, *gradients, *weights[:2]


def self_modifying_triton(
    streams: Streams, state: Memories, spec: MemorySpec, documents: Documents | None = None
) -> SelfModifyingOutput:
    """Run memories over sequences that begin with a chunk, by kernels in float32. As `self_modifying`.

    Differentiable once in all tensors, through all outputs but the statistics.
    """
    return run_packed(_SelfModify, streams, state, spec, documents, share=False)
