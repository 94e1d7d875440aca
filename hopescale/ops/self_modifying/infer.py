"""Memories over sequences without gradients, in C++: nothing is kept, and a call may begin and end within a chunk."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

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


class CBanks(ctypes.Structure):
    """Specs of both banks, as `hopescale_infer` takes them, and tokens of their chunks."""

    _fields_ = [("specs", CMemorySpec * 2), ("periods", ctypes.c_int32 * 2)]


@cache
def banks_of(spec: MemorySpec, dim: int, tokens: int, retention: bool, momentum: bool) -> CBanks:
    """Describe the banks, for calls of at most `tokens` tokens at once and heads of width `dim`."""
    k = torch.empty(1, 1, tokens, dim, device="meta")
    streams = Streams(k, k, k, k[..., 0], k[..., 0] if retention else None, k[..., 0] if momentum else None)
    banks = CBanks()
    for number, bank in enumerate(spec.banks):
        if bank is not None:
            banks.specs[number] = CMemorySpec.of(bank, streams)
            banks.periods[number] = bank.chunk_size
    return banks


class States(NamedTuple):
    """Memories before and after a call, with the addresses of their tensors in the order of `BankTensors`.

    Attributes:
        before: Addresses of the tensors before the first token.
        last: Addresses of those that the call is to write.
        after: Memories of these tensors.
        tensors: Tensors that must outlive the call.
    """

    before: ctypes.Array
    last: ctypes.Array
    after: Memories
    tensors: list[Tensor | None]

    @classmethod
    def of(cls, state: Memories, banks: CBanks, batch: int, position: int | None, tokens: int) -> States:
        """Allocate memories after a call of `tokens` tokens; `position` is None if sequences hold several documents."""
        given, last, after = [], [], []
        for bank, size in zip(state, banks.periods, strict=True):
            if bank is None:
                after.append(None)
                continue
            known = None if position is None else _known_boundary(bank, size, position, tokens)
            running, momentum = _like(bank.running, batch), bank.momentum and _like(bank.momentum, batch)
            after.append(MemoryState(running, momentum, known or _like(bank.running, batch)))
            given += [*bank.running, *(bank.momentum or NO_WEIGHTS), *bank.boundary]
            last += [*running, *(momentum or NO_WEIGHTS), *(NO_WEIGHTS if known else after[-1].boundary)]
        given = [None if x is None else x.contiguous() for x in given]
        return cls(pointers(given), pointers(last), Memories(*after), given)


def _like(weights: Weights, batch: int) -> Weights:
    if len(weights.w_in) == batch:
        return Weights(*[None if x is None else x.new_empty(x.shape) for x in weights])
    return Weights(*[None if x is None else x.new_empty(batch, *x.shape[1:]) for x in weights])


def _known_boundary(bank: MemoryState, size: int, position: int, tokens: int) -> Weights | None:
    """Return the weights that the chunk of the last token begins with, None if it begins after the first token."""
    begins = (position + tokens - 1) // size * size
    if begins > position:
        return None
    return bank.running if begins == position else bank.boundary


def self_modifying_infer(
    streams: Streams, state: Memories, spec: MemorySpec, *, position: int = 0, documents: Documents | None = None
) -> SelfModifyingOutput:
    """Run memories over sequences on a CPU in float32, without gradients. Arguments and result of `self_modifying`."""
    streams = Streams(*(None if x is None else x.contiguous() for x in streams))
    batch, heads, tokens, dim = streams.k.shape
    banks = banks_of(spec, dim, min(tokens, spec.chunk_size), streams.alpha is not None, streams.mu is not None)
    offsets = (documents or Documents.whole(batch, tokens, streams.k.device)).offsets
    layout = CBatch.of(streams, offsets, shared=documents is not None)
    states = States.of(state, banks, batch, position if documents is None else None, tokens)
    y, stats = torch.empty_like(streams.q), streams.q.new_empty(batch, heads, tokens, 3)
    native, where = library(), (banks.specs, banks.periods, ctypes.byref(layout), ctypes.c_int64(position))
    tensors = [pointers(streams), states.before, states.last, pointer(y), pointer(stats)]

    def run(begin: int, end: int) -> None:
        require(native.hopescale_infer(*where, begin, end, *tensors), banks.specs[0])

    parallel_for(run, heads * layout.groups)
    return SelfModifyingOutput(y, stats, states.after)
