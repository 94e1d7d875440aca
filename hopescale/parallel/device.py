"""Where to compute."""

from __future__ import annotations

import torch

from hopescale.common.errors import ConfigError


def choose_device(name: str, origin: str) -> torch.device:
    """Return the device called `auto`, `cpu` or `cuda`; `auto` takes CUDA where there is one.

    Args:
        name: What was asked for.
        origin: The key or option that asked, for messages.

    Raises:
        ConfigError: If the name is unknown, or asks for CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{origin} is {name!r}, but must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(f"{origin} is cuda, but this machine has no usable CUDA device", f"set {origin} to auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
