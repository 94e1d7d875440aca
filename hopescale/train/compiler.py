"""What `train.compile` and `train.backend` need of a machine: asked before the first step, not met in its midst."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from hopescale.common.errors import ConfigError
from hopescale.ops import cpp
from hopescale.ops.delta_rule import KERNEL_DIMS, triton_unsupported_reason


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch could not.

    Raises:
        ConfigError: If there is no C++ compiler for the CPU, or no Triton for a GPU.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            problem = "train.compile is true, but the package triton is not installed"
            raise ConfigError(problem, "install it, or leave train.compile false")
        return
    wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    if not any(shutil.which(name) for name in wanted):
        raise ConfigError(
            f"train.compile is true, but there is no C++ compiler: looked for {', '.join(wanted)}",
            "install one, name it with the environment variable CXX, or leave train.compile false",
        )


def check_backend(backend: str, device: torch.device, head_dim: int, memory_dim: int | None) -> None:
    """Refuse a `train.backend` where it cannot run.

    Raises:
        ConfigError: If the device, the installation, the compiler or the width of heads or memories is in its way.
    """
    unsupported_reason = None
    if backend == "triton":
        widths = {"heads": ("model.head_dim", head_dim), "memories": ("memory_dim", memory_dim)}
        known = ", ".join(map(str, KERNEL_DIMS))
        wrong = (
            f"the kernels know {name} of {known}, {key} is {width}"
            for name, (key, width) in widths.items()
            if width is not None and width not in KERNEL_DIMS
        )
        unsupported_reason = triton_unsupported_reason(device) or next(wrong, None)
    if backend == "cpp":
        unsupported_reason = cpp.unsupported_reason(device, torch.float32)
    if unsupported_reason is not None:
        problem = f"train.backend is {backend}, but {unsupported_reason}"
        raise ConfigError(problem, "set train.backend=auto, which runs without it")
