"""What computes the chunks of a sequence in one operation, where something can."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

from hopescale.ops.cpp import LANES, unsupported_reason
from hopescale.ops.delta_rule import triton_unsupported_reason
from hopescale.ops.self_modifying.cpp import self_modify_cpp
from hopescale.ops.self_modifying.kernel_limits import shape_unsupported_reason
from hopescale.ops.self_modifying.types import ChunksOutput, MemorySpec, Streams, Weights

Backend = Literal["auto", "torch", "triton", "cpp"]

SelfModify = Callable[[Streams, Weights, Weights | None, MemorySpec], ChunksOutput]


def _cpp_unsupported_reason(streams: Streams, spec: MemorySpec) -> str | None:
    widths = {"heads": streams.k.shape[-1], "memories": spec.hidden or LANES}
    odd = [f"{name} of width {width}" for name, width in widths.items() if width % LANES]
    return f"the C++ knows multiples of {LANES}, not {' and '.join(odd)}" if odd else None


def fused_chunks(streams: Streams, running: Weights, spec: MemorySpec, backend: Backend) -> SelfModify | None:
    """Return what runs all chunks of a sequence as one operation: `(streams, running, momentum, spec)` to its output.

    The sequence must begin where a chunk does. Nothing that the operation computes on the way is kept for the backward
    pass but the states that chunks begin with.

    Args:
        streams: Of the sequence.
        running: Weights of the memories at its first token.
        spec: Of the memories.
        backend: `cpp`, `triton`, `torch` for none, or `auto`: C++ on a CPU, Triton on a GPU, for shapes that they know
            and where there is a compiler or Triton.

    Returns:
        None where torch's operations must do.

    Raises:
        ValueError: If `backend` is `cpp` or `triton` and it cannot run.
    """
    device = streams.k.device
    if backend == "torch" or streams.k.shape[2] == 0:
        return None
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        why_not = triton_unsupported_reason(device) or shape_unsupported_reason(streams, running, spec)
        if why_not is None:
            from hopescale.ops.self_modifying.triton import self_modify_triton

            return self_modify_triton
    elif backend == "cpp" or device.type == "cpu":
        known = _cpp_unsupported_reason(streams, spec)
        why_not = known or unsupported_reason(device, streams.k.dtype)
        if why_not is None:
            return self_modify_cpp
        if backend == "auto" and known is None and streams.k.dtype == torch.float32:
            _warn(why_not)
    if backend != "auto":
        raise ValueError(f"backend is {backend!r}, but {why_not}")
    return None


@cache
def _warn(why: str) -> None:
    warnings.warn(f"{why}: memories are trained by torch's operations, several times slower", stacklevel=2)
