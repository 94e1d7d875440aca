"""What `train.compile` needs on the machine: asked before the first step, not met in the middle of it."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from hopescale.common.errors import ConfigError


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
