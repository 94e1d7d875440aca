"""A whole block of Hope for one vector as one operation in C++, without gradients.

A token's arithmetic takes less time than the calls of the operations that a block is made of.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import pointer
from hopescale.ops.self_modifying.cpp import CMemorySpec, require
from hopescale.ops.self_modifying.infer import States, banks_of
from hopescale.ops.self_modifying.types import Memories, MemorySpec


class BlockWeights(NamedTuple):
    """Weights of a block, contiguous and float32; None where it has none.

    Attributes:
        norm: Weight of the norm before the mixer `[N]`.
        in_proj: Projection of heads `[H * 3 * D, N]`, or `[H * 4 * D, N]` with an output gate.
        out_proj: Projection of answers `[N, H * D]`.
        filters: Filters of the convolution `[H * 3 * D, W]`.
        head_norm: Weights of the norms of answers `[H, D]`.
        eta_bias, alpha_bias, mu_bias: Biases of gates `[H]`.
        eta_weight, alpha_weight, mu_weight: Weights of static gates `[H, D]`.
    """

    norm: Tensor
    in_proj: Tensor
    out_proj: Tensor
    filters: Tensor | None
    head_norm: Tensor
    eta_bias: Tensor
    alpha_bias: Tensor | None
    mu_bias: Tensor | None
    eta_weight: Tensor | None
    alpha_weight: Tensor | None
    mu_weight: Tensor | None


class BlockOutput(NamedTuple):
    """Residual stream after a block, memories after its token, and the convolution's tail for the next one."""

    y: Tensor
    state: Memories
    tail: Tensor | None


class _CBlock(ctypes.Structure):
    """`Block` of hope_block.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("width", "heads", "dim", "taps", "unit", "gated", "mlps")),
        ("eps", ctypes.c_float),
        ("specs", CMemorySpec * 2),
        ("periods", ctypes.c_int32 * 2),
        ("hidden", ctypes.c_void_p),
    ]


class BlockOfVector:
    """A block of Hope that maps single vectors: its shape and the addresses of its weights.

    Args:
        weights: Weights of the block without its MLPs, in the order of `BlockWeights`.
        mlps: Weights of its MLPs, in the order of `GatedMlp`, one MLP after the other.
        spec: Memories of the mixer.
        unit: Flag of keys, values and queries: whether their vectors are scaled to unit length.
        eps: Number added under the roots of norms.
    """

    def __init__(
        self,
        weights: BlockWeights,
        mlps: Sequence[Tensor],
        spec: MemorySpec,
        unit: Sequence[bool],
        eps: float,
    ):
        tensors = [*weights, *mlps]
        heads, dim = weights.head_norm.shape
        self.banks = banks_of(spec, dim, 1, weights.alpha_bias is not None, weights.mu_bias is not None)
        taps = 0 if weights.filters is None else weights.filters.shape[1]
        self.hidden = (ctypes.c_int32 * (len(mlps) // 4))(*(len(gate) for gate in mlps[1::4]))
        flags = sum(one << number for number, one in enumerate(unit))
        gated = len(weights.in_proj) > heads * len(unit) * dim
        sizes = (len(weights.norm), heads, dim, taps, flags, gated, len(self.hidden))
        rest = (self.banks.specs, self.banks.periods, ctypes.addressof(self.hidden))
        self.block = _CBlock(*sizes, eps, *rest)
        self.addresses = (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))

    def run(self, x: Tensor, state: Memories, tail: Tensor | None, position: int) -> BlockOutput:
        """Map one vector of the residual stream after `position` tokens; `tail` is `[1, W - 1, H * 3 * D]`.

        Large weights are read by as many threads as torch has.
        """
        states = States.of(state, self.banks, 1, position, 1)
        x, after = x.contiguous(), None
        y = torch.empty_like(x)
        if tail is not None:
            tail = tail.contiguous()
            after = torch.empty_like(tail)
        how = ctypes.byref(self.block), self.addresses, torch.get_num_threads(), ctypes.c_int64(position)
        tensors = [pointer(one) for one in (tail, after, x, y)]
        require(library().hopescale_hope_block(*how, states.before, states.last, *tensors), self.banks.specs[0])
        return BlockOutput(y, states.after, after)
