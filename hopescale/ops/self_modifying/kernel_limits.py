"""What the Triton kernels take. Imports no Triton."""

from __future__ import annotations

import torch

from hopescale.ops.delta_rule.backend import KERNEL_DIMS
from hopescale.ops.self_modifying.types import MemorySpec, Streams, Weights


def shape_unsupported_reason(streams: Streams, running: Weights, spec: MemorySpec) -> str | None:
    """Return what keeps `self_modify_triton` from taking these arguments, None if nothing does.

    Chunks may have any length.
    """
    for name, tensor in (("streams", streams.k), ("weights", running.w_in)):
        if tensor.dtype != torch.float32:
            return f"the kernels compute in float32, {name} are {tensor.dtype}"
    for name, width in (("heads", streams.k.shape[-1]), ("memories", spec.hidden)):
        if width is not None and width not in KERNEL_DIMS:
            return f"the kernels know {name} of width {', '.join(map(str, KERNEL_DIMS))}, not {width}"
    return None
