"""The one public entry: memories are read and written over a sequence, by the fastest code that can run them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hopescale.ops.backends import Backend, Products, Recompute, select
from hopescale.ops.delta_rule import delta_rule
from hopescale.ops.device import device_type, dtype_name
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.chunked import self_modifying_chunked
from hopescale.ops.self_modifying.cpp import self_modifying_cpp
from hopescale.ops.self_modifying.infer import self_modifying_infer
from hopescale.ops.self_modifying.memories import make_inputs
from hopescale.ops.self_modifying.side_by_side import run_side_by_side
from hopescale.ops.self_modifying.start import MemoryStart
from hopescale.ops.self_modifying.types import (
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)


def self_modifying(
    streams: Streams,
    state: Memories | MemoryStart,
    spec: MemorySpec,
    *,
    position: int = 0,
    documents: Documents | None = None,
    backend: Backend = "auto",
    recompute: Recompute = "none",
    compiled: bool = False,
    products: Products = "tf32x3",
) -> SelfModifyingOutput:
    """Run self-modifying memories over a sequence (Nested Learning, arXiv 2512.24695, Eq. 83-93).

    Equal to `self_modifying_naive` up to rounding, whatever computes it.

    Args:
        streams: Inputs of keys, values and queries and logits of gates, float32 (float64 in tests).
        state: Memories before the first token, or learned weights that all sequences begin with. With documents:
            memories that each of them begins with, for a batch of one, or those weights.
        spec: Memories, and how they read and learn.
        position: Tokens that came before; chunks begin at multiples of their size.
        documents: Documents in the sequences, each with memories and chunks of its own. The state returned is that
            after the last one of each sequence. None takes a sequence for one document.
        backend: Code that computes; `backends.select` says which runs where.
        recompute: Activations that the backward pass computes again. `none` keeps all, `reverse` computes also most
            states of chunks again; anything else keeps the states that chunks begin with, and so do the operations over
            all chunks, whatever is said here.
        compiled: Whether a chunk is compiled (`torch.compile`), once for every number of tokens that is met; not with
            documents, which make numbers of all sizes.
        products: Operands of products in the Triton kernels; `tf32x3` is as exact as float32.

    Raises:
        ValueError: If `backend` is `cpp` or `triton`, and it cannot run; if documents are given and tokens came before,
            or if documents or state are of another shape.
    """
    batch, _, tokens, head_dim = streams.k.shape
    if documents is not None:
        _check(documents, state, batch, tokens, position)
    if tokens == 0:
        state = _laid_out(state, batch) if isinstance(state, MemoryStart) or documents is None else state.expand(batch)
        return SelfModifyingOutput(streams.q, streams.q.new_zeros(*streams.q.shape[:3], 3), state)
    choice = select(
        backend,
        spec.shape(head_dim),
        device=device_type(streams.k.device),
        dtype=dtype_name(streams.k.dtype),
        compiled=compiled,
        recompute=recompute,
        needs_grad=torch.is_grad_enabled(),
        whole_chunks=position % spec.chunk_size == 0,
        tokens=None if documents is not None else tokens,
    )
    if choice.backend is None:
        raise ValueError(f"backend is {backend!r}, but {choice.reason}")
    if choice.backend == "triton":
        from hopescale.ops.self_modifying.triton.function import self_modifying_triton

        return self_modifying_triton(streams, state, spec, documents, products=products)
    state = _laid_out(state, batch if documents is None else 1)
    if choice.backend == "cpp" and not torch.is_grad_enabled():
        return self_modifying_infer(streams, state, spec, position=position, documents=documents)
    if choice.backend == "cpp":
        return self_modifying_cpp(streams, state, spec, documents)
    if spec.is_sequential:
        how = {"recompute": recompute, "compiled": compiled}
        run = partial(self_modifying_chunked, spec=spec, position=position, **how)
    else:
        run = partial(_chunks_at_once, spec=spec)
    if documents is None:
        return run(streams, state)
    return run_side_by_side(run, streams, state, documents, spec.projection_chunk_size or spec.chunk_size)


def _laid_out(state: Memories | MemoryStart, batch: int) -> Memories:
    return Memories(state.expand(batch), None) if isinstance(state, MemoryStart) else state


def _check(documents: Documents, state: Memories | MemoryStart, batch: int, tokens: int, position: int) -> None:
    if position:
        raise ValueError(f"documents are given, but those of the {position} tokens before are unknown")
    if documents.first.shape != (batch, tokens):
        raise ValueError(f"documents are of tokens {list(documents.first.shape)}, but there are {[batch, tokens]}")
    if not isinstance(state, MemoryStart) and (found := state.memory.running.w_in.shape[0]) != 1:
        raise ValueError(f"documents begin with one state, but the state is for a batch of {found}")


def _chunks_at_once(streams: Streams, memories: Memories, spec: MemorySpec) -> SelfModifyingOutput:
    """Run a linear memory that stores static values: its chunks do not wait for one another."""
    state = memories.memory
    inputs = make_inputs(spec, state.boundary, streams)
    fresh = spec.entering(inputs.mu)
    u = inputs.v if fresh is None else inputs.v * fresh[..., None]

    def tokens_first(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.transpose(1, 2)

    result = delta_rule(
        *map(tokens_first, (inputs.k, u, inputs.eta, inputs.alpha)),
        state.running.w_in.mT,
        q=tokens_first(inputs.q),
        mu=tokens_first(inputs.mu),
        momentum=None if state.momentum is None else state.momentum.w_in.mT,
        erase=spec.erase,
        read=spec.read,
        chunk_size=spec.chunk_size,
    )
    running = Weights(result.state.mT, None, None)
    momentum = None if result.momentum is None else Weights(result.momentum.mT, None, None)
    stats = torch.stack([inputs.eta, inputs.alpha, inputs.v.norm(dim=-1)], dim=-1).detach()
    state = MemoryState(running, momentum, running)
    return SelfModifyingOutput(result.output.transpose(1, 2), stats, Memories(state, None))
