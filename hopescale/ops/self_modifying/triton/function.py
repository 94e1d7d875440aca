"""The fused chunks as one differentiable operation: what is kept, and which kernel runs on what."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hopescale.ops.backends import Products
from hopescale.ops.documents import Documents
from hopescale.ops.limits import KERNEL_KEEPS, KERNEL_PROGRAMS
from hopescale.ops.self_modifying.packed import run_packed
from hopescale.ops.self_modifying.start import MemoryStart
from hopescale.ops.self_modifying.triton import scratch
from hopescale.ops.self_modifying.triton.backward import self_modify_back_kernel
from hopescale.ops.self_modifying.triton.forward import self_modify_kernel
from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig
from hopescale.ops.self_modifying.triton.replay import replay_kernel
from hopescale.ops.self_modifying.triton.start import pack_start, unpack_start
from hopescale.ops.self_modifying.types import Memories, MemorySpec, SelfModifyingOutput, Streams


class _Places(NamedTuple):
    """Where documents lie, and how many states there are of a head.

    Attributes:
        offsets: Bounds of the documents, on the device, as in `Documents`.
        shared: Whether all begin with one state, and not each row with its own.
        last: Number of each row's last document.
        tokens: Number of tokens of a row.
        chunk_size: Most tokens of a chunk.
        chunks: Most chunks of a document.
        kept: Number of states that the forward kernel keeps.
        slots: Number of states that chunks begin with, or more.
    """

    offsets: Tensor
    shared: bool
    last: list[int]
    tokens: int
    chunk_size: int
    chunks: int
    kept: int
    slots: int

    @classmethod
    def of(cls, k: Tensor, documents: Documents | None, chunk_size: int, learned: bool) -> _Places:
        batch, _, tokens, _ = k.shape
        total = batch * tokens
        if documents is None:
            offsets, last, longest = torch.arange(0, total + 1, tokens, device=k.device), list(range(batch)), tokens
        else:
            offsets, last, longest = documents.offsets, documents.last, max(documents.lengths)
        chunks, kept = -(-longest // chunk_size), max(1, total // (KERNEL_KEEPS * chunk_size))
        slots, shared = total // chunk_size + len(offsets) - 1, learned or documents is not None
        return cls(offsets, shared, last, tokens, chunk_size, chunks, kept, slots)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def row_step(self, heads: int) -> int:
        """Return the distance from a row's first state to the next row's."""
        return 0 if self.shared else heads

    def place(self, like: Tensor, *given: Tensor | None) -> list[Tensor]:
        """Return what is given for each row, `[B, *like]`, at its last document, and zeros at all others `[N, *like]`.

        None stands for zeros.
        """
        placed = like.new_zeros(len(given), self.documents, *like.shape)
        for place, x in zip(placed, given, strict=True):
            if x is not None and len(x) == self.documents:
                place.copy_(x)
            elif x is not None:
                for row, number in enumerate(self.last):
                    place[number] = x[row]
        return list(placed)


class _Space(NamedTuple):
    """Memory of the programs of a launch, which the next launch takes over.

    Attributes:
        carried: Weights that programs move, and their momentum, `[programs, size]` each.
        scratch: Numbers that belong to one piece of a chunk `[programs, size]`.
    """

    carried: tuple[Tensor, Tensor | None]
    scratch: Tensor

    @classmethod
    def of(cls, config: KernelConfig, programs: int, matrices: int, like: Tensor) -> _Space:
        """Allocate, for that many matrices of a piece's tokens."""
        tables = scratch.ROWS.value * config.rows + scratch.TABLES.value * config.rows**2
        size = scratch.SHIFT.value + tables + matrices * config.matrix
        carried = like.new_empty(programs * (1 + config.cut), config.size)
        pair = carried, torch.empty_like(carried) if config.momentum else None
        return cls(pair, like.new_empty(programs, size))


def _launch(kernel: triton.JITFunction, config: KernelConfig, device: torch.device, programs: int, side: int, call):
    """Run a kernel on programs, `side` by side each, in launches that are not too large.

    Args:
        call: Function of the first program that starts a kernel, given how.
    """
    step = max(1, KERNEL_PROGRAMS // side)
    with torch.cuda.device_of(device):
        for begin in range(0, programs, step):
            grid = (min(programs - begin, step), side)
            call(partial(kernel[grid], CONFIG=config, num_warps=config.warps, num_stages=1), begin)


def _forward(config: KernelConfig, places: _Places, streams: Streams, running: Tensor, momentum: Tensor | None, keep):
    """Run the forward kernel: outputs, statistics, the last weights, momentum and boundary, and what is kept."""
    batch, heads, tokens, _ = streams.k.shape
    programs, q = places.documents * heads, streams.q
    space = _Space.of(config, min(programs, KERNEL_PROGRAMS), scratch.FORWARD_MATRICES.value, running)
    kept = running.new_empty(heads, places.kept if keep else 1, config.size, dtype=config.kept_dtype)
    last, boundary = (running.new_empty(batch, heads, config.size) for _ in range(2))
    kept_momenta, last_momenta = (None if momentum is None else torch.empty_like(x) for x in (kept, last))
    y, stats = torch.empty_like(q), q.new_empty(*q.shape[:3], 3)
    tensors = (*streams, running, momentum, *space.carried, kept, kept_momenta, last, last_momenta, boundary, y, stats)
    sizes = (heads, places.row_step(heads), tokens, places.chunk_size, places.kept, config.size, space.scratch.shape[1])

    def call(run, begin: int) -> None:
        run(*tensors, space.scratch, places.offsets, begin, *sizes, KEEP=keep)

    _launch(self_modify_kernel, config, running, programs, 1, call)
    return (y, stats, last, last_momenta, boundary), (kept, kept_momenta)


def _replay(config: KernelConfig, places: _Places, streams: Streams, given: tuple, kept: tuple):
    """Return the packed weights and momentum that all chunks begin with, `[H, slots, size]`."""
    heads, programs, side = streams.k.shape[1], places.documents * streams.k.shape[1], -(-places.chunks // KERNEL_KEEPS)
    most = min(programs, max(1, KERNEL_PROGRAMS // side)) * side
    space = _Space.of(config, most, scratch.FORWARD_MATRICES.value, given[0])
    states = kept[0].new_empty(heads, places.slots, config.size)
    momenta = None if given[1] is None else torch.empty_like(states)
    tensors = (*streams, *given, *kept, *space.carried, states, momenta)
    sizes = (heads, places.row_step(heads), places.tokens, places.chunk_size, places.kept, places.slots)

    def call(run, begin: int) -> None:
        run(*tensors, space.scratch, places.offsets, begin, *sizes, config.size, space.scratch.shape[1])

    _launch(replay_kernel, config, states, programs, side, call)
    return states, momenta


class _SelfModify(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        products: Products,
        learned: bool,
        spec: MemorySpec,
        documents: Documents | None,
        *tensors: Tensor | None,
    ):
        config, places, streams, given = _opened(products, learned, spec, documents, tensors)
        results, kept = _forward(config, places, streams, *given, True)
        ctx.config, ctx.places, ctx.learned = config, places._replace(offsets=None), learned
        ctx.save_for_backward(places.offsets, *given, *kept, *tensors)
        ctx.mark_non_differentiable(results[1])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        d_y: Tensor | None,
        _: None,
        d_last: Tensor | None,
        d_last_momentum: Tensor | None,
        d_start: Tensor | None,
    ):
        config: KernelConfig = ctx.config
        offsets, running, momentum, kept, kept_momenta, *tensors = ctx.saved_tensors
        streams, places = Streams(*tensors[: len(Streams._fields)]), ctx.places._replace(offsets=offsets)
        heads = streams.k.shape[1]
        programs = places.documents * heads
        states = _replay(config, places, streams, (running, momentum), (kept, kept_momenta))
        pieces = -(-min(places.chunk_size, places.tokens) // config.rows)
        again = kept.new_empty(programs if config.cut else 1, max(1, pieces - 1), config.size)
        matrices = scratch.BACKWARD_MATRICES.value + config.layer_matrices
        space = _Space.of(config, min(programs, KERNEL_PROGRAMS), matrices, running).scratch
        # The kernel changes these in place.
        d_running, d_boundary, *d_momentum = places.place(
            running[0], d_last, d_start, *([d_last_momentum] if config.momentum else [])
        )
        d_momentum = d_momentum[0] if config.momentum else None
        gradients = [None if x is None else torch.empty_like(x) for x in streams]
        d_y = torch.zeros_like(streams.q) if d_y is None else d_y.contiguous()
        given = (*streams, *states, again, None if momentum is None else torch.empty_like(again), d_y)
        given += (d_running, d_momentum, d_boundary, *gradients)
        sizes = (heads, places.tokens, places.chunk_size, places.slots, config.size, space.shape[1])

        def call(run, begin: int) -> None:
            run(*given, space, places.offsets, begin, *sizes)

        _launch(self_modify_back_kernel, config, running, programs, 1, call)
        nothing = (None,) * 4
        if ctx.learned:
            return *nothing, *gradients, *unpack_start(config, tensors[len(streams) :], d_running)
        if places.shared:
            d_running, d_momentum = (None if x is None else x.sum(0, keepdim=True) for x in (d_running, d_momentum))
        return *nothing, *gradients, d_running, d_momentum


def self_modifying_triton(
    streams: Streams,
    state: Memories | MemoryStart,
    spec: MemorySpec,
    documents: Documents | None = None,
    *,
    products: Products = "tf32x3",
) -> SelfModifyingOutput:
    """Run memories over sequences that begin with a chunk, by kernels with float32 states. As `self_modifying`.

    Differentiable once in all tensors, through all outputs but the statistics. Without gradients nothing is kept.
    """
    grad = torch.is_grad_enabled()
    run = partial(_SelfModify.apply if grad else _without_gradients, products, isinstance(state, MemoryStart))
    # A state that is dropped after the pass, as in training, needs no memory of its own.
    return run_packed(run, streams, state, spec, documents, share=False, copy=not grad)


def _opened(
    products: Products,
    learned: bool,
    spec: MemorySpec,
    documents: Documents | None,
    tensors: tuple[Tensor | None, ...],
) -> tuple[KernelConfig, _Places, Streams, tuple[Tensor, Tensor | None]]:
    """Plan a call; return the streams too, and packed weights and momentum, packed here if the rest are `learned`."""
    streams, rest = Streams(*tensors[: len(Streams._fields)]), tensors[len(Streams._fields) :]
    config = KernelConfig.of(streams, spec, products)
    places = _Places.of(streams.k, documents, spec.chunk_size, learned)
    return config, places, streams, pack_start(config, rest) if learned else rest


def _without_gradients(
    products: Products, learned: bool, spec: MemorySpec, documents: Documents | None, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    config, places, streams, given = _opened(products, learned, spec, documents, tensors)
    return _forward(config, places, streams, *given, False)[0]
