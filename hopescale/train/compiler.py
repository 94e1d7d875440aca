"""What `train.compile` and `train.backend` need of a machine: asked before the first step, not met in its midst."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from hopescale.common.errors import ConfigError
from hopescale.config.execution import memory_backend
from hopescale.config.model_shape import self_modifying_mixers
from hopescale.config.schema import RunConfig
from hopescale.ops.backends import Choice
from hopescale.ops.device import device_type


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


def choose_backends(config: RunConfig, device: torch.device) -> dict[str, Choice]:
    """Choose the code that trains the memories of each mixer that has some.

    Raises:
        ConfigError: If `train.backend` cannot run: for the device, the installation, the compiler or the memories.
    """
    chosen = {}
    for name, mixer in self_modifying_mixers(config.model).items():
        chosen[name] = choice = memory_backend(config, mixer, device_type(device))
        if choice.backend is None:
            problem = f"train.backend is {config.train.backend}, but {choice.reason}"
            raise ConfigError(problem, "set train.backend=auto, which runs without it")
    return chosen


def mixers_with_kernels(config: RunConfig, device: torch.device) -> list[str]:
    """Return the names of mixers whose memories Triton kernels train.

    Raises:
        ConfigError: Failures that `choose_backends` names.
    """
    return [name for name, choice in choose_backends(config, device).items() if choice.backend == "triton"]
