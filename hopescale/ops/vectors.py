"""Linear maps and norms of vectors without gradients, in C++ where that is faster than torch."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.cpp import build
from hopescale.ops.cpp.call import pointer
from hopescale.ops.limits import BLOCK

FEW_VECTORS = 4
"""Vectors, at most, that are multiplied by each row of a weight as it is read; more of them are worth a packed weight,
or the library behind torch."""

MANY_VECTORS = 128
"""Vectors, at least, for which a weight is laid out anew: chosen, not measured."""

WIDEST = 1024
"""Width up to which C++ maps many vectors. At 192 that was measured to be faster than torch; no other was timed."""

PANEL = 32
"""Rows of a panel of a packed weight, at most."""


def can_map(x: Tensor) -> bool:
    """Tell whether the C++ takes vectors `x`: float32 on a CPU without gradients, in whole blocks."""
    if torch.is_grad_enabled() or not x.is_cpu or x.dtype != torch.float32 or x.shape[-1] % BLOCK or not x.numel():
        return False
    return build.problem() is None


def is_plain(weight: Tensor) -> bool:
    """Tell whether the C++ can read a weight where it lies: float32 on a CPU, row by row, with memory of its own."""
    return weight.is_cpu and weight.dtype == torch.float32 and weight.is_contiguous() and weight.data_ptr() != 0


def are_few(x: Tensor) -> bool:
    """Tell whether each row of a weight is multiplied by all of the vectors as it is read."""
    return x.numel() <= FEW_VECTORS * x.shape[-1]


def can_map_fast(x: Tensor, num_rows: int) -> bool:
    """Tell whether products of vectors `x` with weights of `num_rows` rows are faster than torch's.

    For one vector torch has one thread in any case, and for several it takes many times as long for each.
    """
    if are_few(x):
        return True
    count = x.numel() // x.shape[-1]
    return count >= MANY_VECTORS and x.shape[-1] <= WIDEST and not num_rows % BLOCK


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Map vectors `[..., N]` by a weight `[M, N]`, like `torch.nn.functional.linear`."""
    threads = torch.get_num_threads()
    if torch.is_grad_enabled() or (threads > 1 and not are_few(x)) or not can_map(x):
        return F.linear(x, weight)
    rows, columns = weight.shape
    if x.shape[-1] != columns or not is_plain(weight) or not can_map_fast(x, rows):
        return F.linear(x, weight)
    x, y, count = x.contiguous(), x.new_empty(*x.shape[:-1], rows), x.numel() // columns
    many = not are_few(x)
    weight = pack(weight) if many else weight
    build.library().hopescale_linear(rows, columns, many, count, threads, pointer(weight), pointer(x), pointer(y))
    return y


def pack(weight: Tensor) -> Tensor:
    """Lay a weight `[M, N]` out for products with many vectors."""
    rows, columns = weight.shape
    packed = weight.new_empty(-(-rows // PANEL) * PANEL * columns)
    build.library().hopescale_pack(rows, columns, pointer(weight), pointer(packed))
    return packed


def cpp_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `ops.norm.rms_norm` of vectors `[..., N]` that `can_map` takes, on one thread."""
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    how = width, x.numel() // width, ctypes.c_float(eps)
    build.library().hopescale_rms_norm(*how, pointer(weight), pointer(x), pointer(y))
    return y
