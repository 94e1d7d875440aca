"""Memories over sequences without gradients, in C++: nothing is kept, and a call may begin and end within a chunk."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer, pointers
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.cpp import CBatch, CMemorySpec, require
from hopescale.ops.self_modifying.types import (
    NO_WEIGHTS,
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)


class _Banks(ctypes.Structure):
    """The first two arguments of `hopescale_infer`: specs of both banks, and tokens of their chunks."""

    _fields_ = [("specs", CMemorySpec * 2), ("periods", ctypes.c_int32 * 2)]


def _banks(spec: MemorySpec, streams: Streams) -> _Banks:
    """Describe the banks, for calls with these streams."""
    banks = _Banks()
    for number, bank in enumerate(spec.banks):
        if bank is not None:
            banks.specs[number] = CMemorySpec.of(bank, streams)
            banks.specs[number].chunk = min(spec.chunk_size, streams.k.shape[2])
            banks.periods[number] = bank.chunk_size
    return banks


def _tensors(bank: MemoryState) -> list[Tensor | None]:
    """Return the tensors of a bank in the order of `BankTensors` in infer.cpp, contiguous."""
    parts = (*bank.running, *(bank.momentum or NO_WEIGHTS), *bank.boundary)
    return [None if x is None else x.contiguous() for x in parts]


def _like(weights: Weights, batch: int) -> Weights:
    return Weights(*(None if x is None else x.new_empty(batch, *x.shape[1:]) for x in weights))


def _after(bank: MemoryState, batch: int, boundary: Weights | None) -> MemoryState:
    """Allocate the state after the last token, with a boundary that is known or another one."""
    running, momentum, _ = bank
    momentum = None if momentum is None else _like(momentum, batch)
    return MemoryState(_like(running, batch), momentum, boundary or _like(running, batch))


def _known_boundary(bank: MemoryState, size: int, position: int, tokens: int) -> Weights | None:
    """Return the weights at the start of the chunk of the last token, None if that starts after the first token."""
    begins = (position + tokens - 1) // size * size
    if begins > position:
        return None
    return bank.running if begins == position else bank.boundary


def self_modifying_infer(
    streams: Streams, state: Memories, spec: MemorySpec, *, position: int = 0, documents: Documents | None = None
) -> SelfModifyingOutput:
    """Run memories over sequences on a CPU in float32, without gradients. Arguments and result of `self_modifying`."""
    streams = Streams(*(None if x is None else x.contiguous() for x in streams))
    batch, heads, tokens, _ = streams.k.shape
    banks = _banks(spec, streams)
    offsets = (documents or Documents.whole(batch, tokens, streams.k.device)).offsets
    layout = CBatch.of(streams, offsets, shared=documents is not None)
    given, after = [], []
    for bank, size in zip(state, banks.periods, strict=True):
        if bank is not None:
            known = None if documents else _known_boundary(bank, size, position, tokens)
            after.append((_after(bank, batch, known), known is not None))
            given.append(bank)
    before = [x for bank in given for x in _tensors(bank)]
    last = [x for bank, known in after for x in _tensors(bank._replace(boundary=NO_WEIGHTS) if known else bank)]
    y, stats = torch.empty_like(streams.q), streams.q.new_empty(batch, heads, tokens, 3)
    native, tensors = library(), [pointers(streams), pointers(before), pointers(last), pointer(y), pointer(stats)]
    where = banks.specs, banks.periods, ctypes.byref(layout), ctypes.c_int64(position)

    def run(begin: int, end: int) -> None:
        require(native.hopescale_infer(*where, begin, end, *tensors), banks.specs[0])

    parallel_for(run, heads * layout.groups)
    memory, projection = (bank for bank, _ in (*after, (None, True))[:2])
    return SelfModifyingOutput(y, stats, Memories(memory, projection))
