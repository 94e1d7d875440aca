"""Gated MLPs one after the other, with their norms and residual connections, as one operation without gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer, pointers
from hopescale.ops.limits import BLOCK
from hopescale.ops.vectors import are_few, can_map, can_map_fast, is_plain, pack

TILE_VECTORS = 128
"""Vectors that a thread runs through all MLPs at a time."""


class GatedMlp(NamedTuple):
    """Weights of an MLP `down(silu(gate x) * up x)` with its norm: `[N]`, `[F, N]`, `[F, N]`, `[N, F]`, float32."""

    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def can_run_mlps(x: Tensor, mlps: Sequence[GatedMlp]) -> bool:
    """Tell whether `gated_mlps` takes these vectors and weights, and is the faster code for them."""
    threads = torch.get_num_threads()
    if threads > 1 and not are_few(x) and x.numel() < threads * TILE_VECTORS * x.shape[-1]:
        return False  # one thread would have it all
    if not can_map(x) or not all(can_map_fast(x, len(mlp.gate)) and len(mlp.gate) % BLOCK == 0 for mlp in mlps):
        return False
    return all(is_plain(weight) for mlp in mlps for weight in mlp)


def gated_mlps(x: Tensor, added: Tensor | None, mlps: Sequence[GatedMlp], eps: float) -> Tensor:
    """Return `y` after `y = x + added` and, for each MLP, `y = y + mlp(rms_norm(y))`; vectors are `[..., N]`."""
    x, added = x.contiguous(), None if added is None else added.contiguous()
    result = torch.empty_like(x)
    width, native = x.shape[-1], library()
    count = x.numel() // width
    weights = [weight for mlp in mlps for weight in mlp]
    if many := not are_few(x):
        weights = [weight if weight.dim() == 1 else pack(weight) for weight in weights]
    hidden = (ctypes.c_int32 * len(mlps))(*[mlp.gate.shape[0] for mlp in mlps])
    how = width, ctypes.c_float(eps), many, len(mlps), hidden, pointers(weights), torch.get_num_threads()
    tensors = [pointer(one) for one in (x, added, result)]

    def run(begin: int, end: int) -> None:
        first, last = (min(count, tile * TILE_VECTORS) for tile in (begin, end))
        native.hopescale_gated_mlps(*how, first, last, *tensors)

    parallel_for(run, -(-count // TILE_VECTORS))
    return result
