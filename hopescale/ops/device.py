"""Types of devices and of numbers as `backends` names them."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types of numbers by the names that configs give them."""


def device_type(device: torch.device) -> str:
    """Return the type of a device, `cuda` for NVIDIA GPUs with TF32 and bfloat16 alone.

    AMD GPUs, which torch calls `cuda` too, are `rocm`; NVIDIA's before Ampere are called by their capability: `sm_70`.
    """
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return "rocm"
    if not torch.cuda.is_available():
        return "cuda"
    major, minor = torch.cuda.get_device_capability(device)
    return "cuda" if major >= 8 else f"sm_{major}{minor}"


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device; a GPU takes it from page-locked memory, while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type without its package."""
    return str(dtype).removeprefix("torch.")
