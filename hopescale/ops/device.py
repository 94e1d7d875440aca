"""Types of devices and of numbers as `backends` names them."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of numbers by the names that configs give them."""


def device_type(device: torch.device) -> str:
    """Return the type of a device; AMD GPUs, which torch calls `cuda`, are `rocm`."""
    return "rocm" if device.type == "cuda" and torch.version.hip is not None else device.type


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type without its package."""
    return str(dtype).removeprefix("torch.")
