"""Norms, gates and streams around the memories in few launches: Triton kernels, and the same in torch's operations."""

from __future__ import annotations

from torch import Tensor

from hopescale.ops.backends import Backend, select_fused
from hopescale.ops.device import device_type, dtype_name


def is_fused(backend: Backend, x: Tensor, head_dim: int | None = None) -> bool:
    """Tell whether kernels run the operations around memories, for tensors like `x`, by `backends.select_fused`."""
    if (x.device.type == "cpu" and backend != "triton") or not x.numel():
        return False
    return select_fused(backend, device_type(x.device), dtype_name(x.dtype), head_dim) == "triton"
