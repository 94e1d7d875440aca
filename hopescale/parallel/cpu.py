"""Megatron-core on the CPU, which stands in for the CUDA device that it asks for. Not used by runs on CUDA."""

from __future__ import annotations

import types
from typing import Any

import torch

from hopescale.parallel import quiet_imports


class _TorchOnCpu(types.ModuleType):
    """`torch` as a Megatron module sees it: requests to the current CUDA device are answered by the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*shape: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*shape, device=None if device == "cuda" else device, **options)


class _CudaOnCpu(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize() -> None:
        pass


def let_megatron_use_the_cpu() -> None:
    """Let Megatron's mappings and pipeline schedules run on CPU tensors, in this process, for good.

    They place buffers on the current CUDA device by name. Only these modules see the replacement.
    """
    from megatron.core import utils

    with quiet_imports():
        from megatron.core.pipeline_parallel import p2p_communication, schedules
        from megatron.core.tensor_parallel import layers, mappings

    view = _TorchOnCpu()
    for module in (layers, mappings, schedules, p2p_communication, utils):
        module.torch = view
