"""Triton's launch path without a GPU: kernels are bound, specialised and compiled as for one, but do not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Launch(NamedTuple):
    """A kernel that would have run.

    Attributes:
        kernel: Name of the kernel and of the module that it lies in.
        grid: Numbers of programs.
        compiled: What Triton would have launched.
    """

    kernel: str
    grid: tuple[int, ...]
    compiled: Any


class _Driver:
    """A GPU of a compute capability, as far as compiling asks for one."""

    launcher_cls = None

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> str:
        """Return a name, as Triton keeps kernels by devices, and those of a real one are numbers."""
        return f"sm_{self.capability}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def noted_launches(folder: Path, capability: int = 90) -> Iterator[list[Launch]]:
    """Compile what is launched for a GPU of a compute capability, without the point, and write it down.

    Tensors lie on the CPU, and keep what they hold.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        launches.append(Launch(name, tuple(grid), compiled))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        patch.setattr(driver, "_active", _Driver(capability))
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
        yield launches
