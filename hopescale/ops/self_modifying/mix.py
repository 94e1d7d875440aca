"""All work of a mixer between its projections as one operation in C++, without gradients, for single tokens above all.

A token's arithmetic takes less time than the calls of a dozen small operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.backends import Backend, select
from hopescale.ops.cpp.build import library
from hopescale.ops.cpp.call import parallel_for, pointer
from hopescale.ops.device import device_type
from hopescale.ops.head_streams import CLayout
from hopescale.ops.self_modifying.cpp import CBatch, require
from hopescale.ops.self_modifying.infer import States, banks_of
from hopescale.ops.self_modifying.types import Memories, MemorySpec


class GateWeights(NamedTuple):
    """Weights of a gate: its bias `[H]`, and those for a key's input `[H, D]` if it is static."""

    bias: Tensor
    weight: Tensor | None


class MixedHeads(NamedTuple):
    """Result of `mix_heads`.

    Attributes:
        y: Normed answers `[T, B, H, D]`.
        state: Memories after the last token.
        tail: Last inputs of the convolution, for the next call; None without one.
    """

    y: Tensor
    state: Memories
    tail: Tensor | None


class _Mixer(ctypes.Structure):
    """`Mixer` of infer.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("filters", "tail", "tail_after")),
        *((name, ctypes.c_void_p * 3) for name in ("bias", "weight")),
        ("norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
    ]


def can_mix(x: Tensor, spec: MemorySpec, backend: Backend) -> bool:
    """Tell whether `mix_heads` can run the heads whose projected inputs are `x`, by `backends.select`."""
    if torch.is_grad_enabled() or x.dtype != torch.float32:
        return False
    choice = select(backend, spec.shape(x.shape[-1]), device=device_type(x.device), needs_grad=False)
    return choice.backend == "cpp" and x.numel() > 0


def mix_heads(
    x: Tensor,
    filters: Tensor | None,
    tail: Tensor | None,
    unit: Sequence[bool],
    gates: tuple[GateWeights, GateWeights | None, GateWeights | None],
    norm: Tensor,
    norm_eps: float,
    state: Memories,
    spec: MemorySpec,
    *,
    position: int = 0,
) -> MixedHeads:
    """Run a mixer's heads over a sequence on a CPU in float32, without gradients.

    Equal, up to rounding, to `head_streams`, the gates' logits, `self_modifying` and `rms_norm` in a row.

    Args:
        x: Projected inputs of keys, values and queries `[T, B, H, 3, D]`.
        filters: Filters of the convolution, as in `head_streams`.
        tail: Inputs before `x`, as in `head_streams`.
        unit: Flag of each slice of `x`: whether its vectors are scaled to unit length.
        gates: Weights of eta, alpha and mu; None for a gate that is missing.
        norm: Weight of the RMSNorm of each head `[H, D]`.
        norm_eps: Number added under the norm's root.
        state: Memories before the first token.
        spec: Memories, and how they read and learn.
        position: Tokens that came before.
    """
    tokens, batch, heads, _, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, alpha, mu = gates
    banks = banks_of(spec, dim, min(tokens, spec.chunk_size), alpha is not None, mu is not None)
    states = States.of(state, banks, batch, position, tokens)
    after = None
    if filters is not None:
        filters, tail = filters.contiguous(), tail.contiguous()
        after = torch.empty_like(tail)
    weights = [x for gate in gates for x in (gate or (None, None))]
    addresses = [0 if one is None else one.data_ptr() for one in (filters, tail, after, *weights[::2], *weights[1::2])]
    mixer = _Mixer(*addresses[:3], tuple(addresses[3:6]), tuple(addresses[6:]), norm.data_ptr(), norm_eps)
    work, y = x.new_empty(batch * heads * tokens * (4 * dim + 6)), x.new_empty(tokens, batch, heads, dim)
    bounds = (ctypes.c_int64 * (batch + 1))(*range(0, batch * tokens + 1, tokens))
    sequences = CBatch(tokens, heads, batch, 0, tokens, batch, ctypes.addressof(bounds))
    layout = CLayout.of(x, filters, unit)
    native, where = library(), [ctypes.byref(layout), ctypes.byref(mixer), banks.specs, banks.periods]
    where += [ctypes.byref(sequences), ctypes.c_int64(position)]
    tensors = [pointer(x), states.before, states.last, pointer(work), pointer(y)]

    def run(begin: int, end: int) -> None:
        require(native.hopescale_mix(*where, begin, end, *tensors), banks.specs[0])

    parallel_for(run, heads)
    return MixedHeads(y, states.after, after)
