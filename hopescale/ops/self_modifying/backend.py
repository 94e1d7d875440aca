"""What computes the chunks of a sequence in one operation, where something can."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch

from hopescale.ops.cpp import LANES, obstacle
from hopescale.ops.self_modifying.cpp import self_modify_cpp
from hopescale.ops.self_modifying.types import ChunkRule, ChunksOutput, Streams, Weights

Backend = Literal["auto", "torch", "triton", "cpp"]

SelfModify = Callable[[Streams, Weights, Weights | None, ChunkRule], ChunksOutput]


def _cpp_shape_obstacle(streams: Streams, rule: ChunkRule) -> str | None:
    widths = {"heads": streams.k.shape[-1], "memories": rule.hidden or LANES}
    odd = [f"{name} of width {width}" for name, width in widths.items() if width % LANES]
    return f"the C++ knows multiples of {LANES}, not {' and '.join(odd)}" if odd else None


def fused_chunks(streams: Streams, rule: ChunkRule, backend: Backend) -> SelfModify | None:
    """Return what runs all chunks of a sequence as one operation: `(streams, running, momentum, rule)` to its output.

    The sequence must begin where a chunk does. Nothing that the operation computes on the way is kept for the backward
    pass but the states that chunks begin with.

    Args:
        streams: Of the sequence.
        rule: Of the memories.
        backend: `cpp`, `torch` for none, or `auto`: C++ on a CPU, for shapes it knows and where there is a compiler.

    Returns:
        None where torch's operations must do.

    Raises:
        ValueError: If `backend` is `cpp` and it cannot run.
    """
    if backend not in ("auto", "cpp") or (backend == "auto" and streams.k.device.type != "cpu"):
        return None
    why_not = _cpp_shape_obstacle(streams, rule) or obstacle(streams.k.device, streams.k.dtype)
    if why_not is None:
        return self_modify_cpp
    if backend == "cpp":
        raise ValueError(f"backend is 'cpp', but {why_not}")
    if streams.k.dtype == torch.float32 and not _cpp_shape_obstacle(streams, rule):
        _warn(why_not)
    return None


@cache
def _warn(why: str) -> None:
    warnings.warn(f"{why}: memories are trained by torch's operations, several times slower", stacklevel=2)
