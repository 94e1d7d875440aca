"""Learned weights packed for all sequences, and gradients of packed ones unpacked and added up, in one kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

ROWS = 32
"""Most rows of a packed layer that a program moves."""


@triton.jit
def _move_layer(
    learned, packed, momentum, head, begin, documents, distance,
    MEMORY: tl.constexpr, LAYER: tl.constexpr, OUTPUTS: tl.constexpr, MOMENTUM: tl.constexpr, SIZE: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Move rows of a head's layer, learned as `[OUTPUTS, K]`, which is 0 beyond those outputs where it is packed."""
    N: tl.constexpr = LAYER.outputs
    k, n = begin + tl.arange(0, SIZE)[:, None], tl.arange(0, N)[None, :]
    inside, there = (n < OUTPUTS) & (k < LAYER.inputs), LAYER.begin + MEMORY * LAYER.step + k * LAYER.row + n
    here = learned + head * OUTPUTS * LAYER.inputs + n * LAYER.inputs + k
    if BACK:
        total = tl.zeros((SIZE, N), tl.float32)
        for document in range(documents):
            total += tl.load(packed + tl.cast(document, tl.int64) * distance + there, mask=inside, other=0.0)
        tl.store(here, total.to(learned.dtype.element_ty), mask=inside)
    else:
        value = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(packed + there, value, mask=k < LAYER.inputs)
        if MOMENTUM:
            tl.store(momentum + there, tl.zeros_like(value), mask=k < LAYER.inputs)


@triton.jit(do_not_specialize=["documents"])
def move_start_kernel(
    first, second, packed, momentum, documents, heads, CONFIG: tl.constexpr, SIZE: tl.constexpr, BACK: tl.constexpr
):
    """Pack learned layers, given by memory, with momentum 0, or go back from the gradients of packed documents.

    A program has some rows of the layers of one memory of a head.
    """
    VECTORS: tl.constexpr = CONFIG.vectors
    GATES: tl.constexpr = CONFIG.gates
    FIRST: tl.constexpr = VECTORS.first
    SECOND: tl.constexpr = VECTORS.second
    GATE: tl.constexpr = GATES.first
    LAST: tl.constexpr = GATES.second
    WIDE: tl.constexpr = CONFIG.vector_memories
    MEMORIES: tl.constexpr = CONFIG.vector_memories + CONFIG.gate_memories
    D: tl.constexpr = CONFIG.dim
    E: tl.constexpr = CONFIG.hidden
    G: tl.constexpr = CONFIG.hidden if CONFIG.mlp else 1
    M: tl.constexpr = CONFIG.momentum
    head, begin, step = tl.program_id(0).to(tl.int64), tl.program_id(2) * SIZE, heads * CONFIG.size
    packed += head * CONFIG.size
    momentum += head * CONFIG.size
    for m in tl.static_range(WIDE):
        if tl.program_id(1) == m:
            _move_layer(first[m], packed, momentum, head, begin, documents, step, m, FIRST, E, M, SIZE, BACK)
            if CONFIG.mlp:
                _move_layer(second[m], packed, momentum, head, begin, documents, step, m, SECOND, D, M, SIZE, BACK)
    for m in tl.static_range(WIDE, MEMORIES):
        if tl.program_id(1) == m:
            _move_layer(first[m], packed, momentum, head, begin, documents, step, m - WIDE, GATE, G, M, SIZE, BACK)
            if CONFIG.mlp:
                _move_layer(second[m], packed, momentum, head, begin, documents, step, m - WIDE, LAST, 1, M, SIZE, BACK)


def _move(
    config: KernelConfig, learned: Sequence[Tensor], packed: Tensor, momentum: Tensor | None, documents: int, back: bool
) -> None:
    memories, rows = config.vector_memories + config.gate_memories, max(config.dim, config.hidden)
    first, second, size = tuple(learned[:memories]), tuple(learned[-memories:]), min(ROWS, config.dim, config.hidden)
    heads, momentum = packed.shape[1], packed if momentum is None else momentum
    with torch.cuda.device_of(packed):
        move_start_kernel[heads, memories, triton.cdiv(rows, size)](
            first, second, packed, momentum, documents, heads, CONFIG=config, SIZE=size, BACK=back
        )


def pack_start(config: KernelConfig, learned: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pack the learned weights of a `MemoryStart`, `[1, H, size]`, with their momentum."""
    packed = learned[0].new_empty(1, learned[0].shape[0], config.size, dtype=torch.float32)
    momentum = torch.empty_like(packed) if config.momentum else None
    _move(config, learned, packed, momentum, 1, False)
    return packed, momentum


def unpack_start(config: KernelConfig, learned: Sequence[Tensor], d_packed: Tensor) -> list[Tensor]:
    """Make the gradients of learned weights from those of packed ones by document, `[N, H, size]`."""
    gradients = [torch.empty_like(each) for each in learned]
    _move(config, gradients, d_packed, None, len(d_packed), True)
    return gradients
