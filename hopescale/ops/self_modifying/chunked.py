"""Self-modifying memories in torch's operations, chunk after chunk: the form that can do everything.

Two things only this form has: memories in two banks, whose chunks have different sizes, and `train.recompute: reverse`,
which computes the states of chunks again from what chunks wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hopescale.ops.backends import Recompute
from hopescale.ops.delta_rule.decay import decay_weights
from hopescale.ops.limits import REVERSE_PARTS
from hopescale.ops.self_modifying.advance import Trace, advance
from hopescale.ops.self_modifying.memories import make_inputs, write_values
from hopescale.ops.self_modifying.scan import Replay, scan
from hopescale.ops.self_modifying.types import (
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
)

Traces = tuple[Trace, Trace | None]


def self_modifying_chunked(
    streams: Streams,
    state: Memories,
    spec: MemorySpec,
    *,
    position: int = 0,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> SelfModifyingOutput:
    """Run memories over a sequence as a loop over projection chunks. Arguments and result of `self_modifying`."""
    size = spec.projection_chunk_size or spec.chunk_size
    sizes = _pieces(position, streams.k.shape[2], size)
    offsets = [(position + end - part) % size for end, part in zip(accumulate(sizes), sizes, strict=True)]
    run = _compiled(spec) if compiled else partial(_run_chunk, spec.banks)

    def step(index: int, state: Memories, parts: Streams) -> tuple[list[Tensor], Memories, Traces | None]:
        *outputs, state, traces = run(offsets[index], parts, state)
        if index < len(sizes) - 1:
            state = state.at_boundary()
        return outputs, state, traces if recompute == "reverse" else None

    replay = Replay(_follow, REVERSE_PARTS) if recompute == "reverse" else None
    (y, stats), state = scan(step, sizes, streams, state, recompute=recompute != "none", replay=replay)
    return SelfModifyingOutput(y, stats, state)


@cache
def _compiled(spec: MemorySpec) -> Callable[..., Any]:
    """Return `_run_chunk`, compiled once for every number of tokens that is met."""
    banks = spec.banks

    def run(offset: int, streams: Streams, state: Memories) -> tuple[Tensor, Tensor, Memories, Traces]:
        return _run_chunk(banks, offset, streams, state)

    return torch.compile(run, fullgraph=True, dynamic=False)


def _follow(state: Memories, traces: Traces) -> Memories:
    """Return the state after a projection chunk, at its boundary, from that before it."""
    return Memories(
        *(None if bank is None else trace.add(bank) for bank, trace in zip(state, traces, strict=True))
    ).at_boundary()


def _run_chunk(
    banks: tuple[MemorySpec, MemorySpec | None], offset: int, streams: Streams, state: Memories
) -> tuple[Tensor, Tensor, Memories, Traces]:
    """Run the memories over a projection chunk, or a part of one that begins `offset` tokens into it.

    Returns:
        Outputs and statistics, as in `SelfModifyingOutput`; the state after it, and what led each bank there.
    """
    (main, other), (memory, projection) = banks, state
    if other is None:
        memory = memory.at_boundary() if offset == 0 else memory
        inputs = make_inputs(main, memory.boundary, streams)
    else:
        projection = projection.at_boundary() if offset == 0 else projection
        inputs = make_inputs(other, projection.boundary, streams)
    outputs, surprises, other_trace = [], [], None
    for part in inputs.split(_pieces(offset, inputs.k.shape[2], main.chunk_size)):
        if offset % main.chunk_size == 0:
            memory = memory.at_boundary()
        y, surprise, memory, trace = _move(main, memory, part, part.q)
        outputs.append(y)
        surprises.append(surprise[:, :, 0])
        offset += part.k.shape[2]
    if other is not None:
        _, _, projection, other_trace = _move(other, projection, inputs, None)
    if len(outputs) > 1:
        trace = Trace.of_state(memory)
    y, surprise = (torch.cat(x, dim=2) if len(x) > 1 else x[0] for x in (outputs, surprises))
    stats = torch.stack([inputs.eta, inputs.alpha, surprise], dim=-1).detach()
    return y, stats, Memories(memory, projection), (trace, other_trace)


def _move(
    spec: MemorySpec, state: MemoryState, inputs: Streams, q: Tensor | None
) -> tuple[Tensor | None, Tensor | None, MemoryState, Trace]:
    """Move a bank over one of its chunks: answers to queries, norms of errors, the state after it, its trace."""
    decay = decay_weights(inputs.eta, inputs.alpha, inputs.mu)
    writes = write_values(spec, state.boundary, inputs.k, inputs.v, inputs.mu)
    y, state, trace = advance(spec, state, writes, decay, q)
    return y, writes.surprise, state, trace


def _pieces(position: int, tokens: int, size: int) -> list[int]:
    """Cut `tokens` tokens that follow `position` others at multiples of `size`; return the sizes of the parts."""
    first = min(tokens, size - position % size)
    rest = tokens - first
    return [first, *[size] * (rest // size), *[rest % size] * (rest % size > 0)]
