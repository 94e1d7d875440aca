"""All weights of memories in one row of numbers: how the operations over all chunks, in C++ and in Triton, keep them.

First layers come first, then second layers of vector memories, then those of gate memories. The one column of a gate
memory is padded to `BLOCK`; in the C++ those of linear memories share a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.documents import Documents
from hopescale.ops.limits import BLOCK
from hopescale.ops.self_modifying.start import MemoryStart
from hopescale.ops.self_modifying.types import (
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)


def pack(weights: Weights, spec: MemorySpec, *, share: bool) -> Tensor:
    """Lay weights side by side, `[B, H, size]`; `share` puts the gates of linear memories into one block."""
    w_in, w_out_vector, w_out_gate = weights
    if spec.hidden is None and spec.gate_memories:
        vectors, gates = w_in.split([w_in.shape[-1] - len(spec.gate_memories), len(spec.gate_memories)], dim=-1)
        if share:
            gates = F.pad(gates, (0, -gates.shape[-1] % BLOCK))
        else:
            gates = F.pad(gates[..., None], (0, BLOCK - 1)).flatten(3)
        w_in = torch.cat([vectors, gates], dim=-1)
    if w_out_gate is not None:
        w_out_gate = F.pad(w_out_gate, (0, BLOCK - 1))
    return torch.cat([part.flatten(2) for part in (w_in, w_out_vector, w_out_gate) if part is not None], dim=2)


def unpack(packed: Tensor, spec: MemorySpec, dim: int, *, share: bool, copy: bool) -> Weights:
    """Undo `pack`, for heads of width `dim`; without `copy`, layers of MLP memories are views."""
    vectors, gates, hidden = len(spec.vector_memories), len(spec.gate_memories), spec.hidden
    if hidden is None:
        w_in = packed.unflatten(2, (dim, -1))
        narrow = w_in[..., vectors * dim :]
        narrow = narrow[..., :gates] if share else narrow[..., ::BLOCK]
        return Weights(torch.cat([w_in[..., : vectors * dim], narrow], dim=-1), None, None)
    sizes = [dim * hidden * (vectors + gates), hidden * dim * vectors, hidden * BLOCK * gates]
    w_in, w_out_vector, w_out_gate = packed.split(sizes, dim=2)
    parts = (
        w_in.unflatten(2, (dim, -1)),
        w_out_vector.unflatten(2, (vectors, hidden, -1)) if vectors else None,
        w_out_gate.unflatten(2, (gates, hidden, -1))[..., :1] if gates else None,
    )
    return Weights(*(part.contiguous() if copy and part is not None else part for part in parts))


def run_packed(
    operation: Callable[..., tuple[Tensor | None, ...]],
    streams: Streams,
    state: Memories | MemoryStart,
    spec: MemorySpec,
    documents: Documents | None,
    *,
    share: bool,
    copy: bool = True,
) -> SelfModifyingOutput:
    """Run memories over sequences that begin with a chunk by one operation. As `self_modifying`.

    Args:
        operation: Function of a spec, documents, the streams, packed weights and their packed momentum, or the learned
            weights of a `MemoryStart`. It returns outputs, statistics, and packed weights, momentum and weights at the
            last boundary.
        streams: Streams that are cut nowhere.
        state: Memories before the first token, or what all sequences begin with where the operation takes it; with
            documents those that each begins with, for a batch of one.
        spec: Memories, all in one bank.
        documents: Documents in the sequences; None takes each sequence for one.
        share: Whether gates share a block, as in `pack`.
        copy: Whether the state returned has memory of its own.
    """
    inputs = (None if x is None else x.contiguous() for x in streams)
    if isinstance(state, MemoryStart):
        first = (each.contiguous() for each in state.tensors)
    else:
        first = (None if x is None else pack(x, spec, share=share) for x in state.memory[:2])
    y, stats, *last = operation(spec, documents, *inputs, *first)
    how = {"share": share, "copy": copy}
    after = MemoryState(*(None if x is None else unpack(x, spec, streams.k.shape[-1], **how) for x in last))
    return SelfModifyingOutput(y, stats, Memories(after, None))
