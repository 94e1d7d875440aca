"""Making torch believe in a GPU: `pretend` before anything of CUDA is asked. For a process of its own."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SOURCE = Path(__file__).with_name("guard.cpp")
_TORCH = Path(importlib.util.find_spec("torch").origin).parent

HOST_READS: Counter[str] = Counter()
"""Reads of values on the device by the host, each of which waits for it, by the line of the package that asked."""


def problem() -> str | None:
    """Return why there can be no such device, None if there can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    if not (_TORCH / "include" / "ATen" / "detail" / "CUDAHooksInterface.h").exists():
        return "torch is installed without its headers"
    version = (_TORCH / "version.py").read_text()
    return None if "cuda: Optional[str] = None" in version else "torch is built for CUDA"


def build(folder: Path) -> Path:
    """Compile the device into a folder."""
    library = folder / "guard.so"
    flags = ["-O1", "-shared", "-fPIC", "-std=c++17", f"-I{_TORCH / 'include'}"]
    subprocess.run(["g++", *flags, str(_SOURCE), "-o", str(library)], check=True)
    return library


def load(library: Path) -> None:
    """Register the device; torch must not have been imported yet."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class _Context:
    """A stream, an event, a guard: whatever is entered or called, nothing happens."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Context()


def pretend() -> None:
    """Answer as one H200 does to what Python asks of CUDA, and note what the host reads."""
    import torch

    properties = SimpleNamespace(
        total_memory=141 * 2**30, name="NVIDIA H200", major=9, minor=0, multi_processor_count=132
    )
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "mem_get_info": (140 * 2**30, 141 * 2**30),
        "memory_stats": {},
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("set_device", "synchronize", "_lazy_init", "empty_cache", "reset_peak_memory_stats"), None),
        **dict.fromkeys(("manual_seed_all", "set_rng_state"), None),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("Stream", "Event", "stream", "StreamContext", "device_of", "current_stream", "default_stream"):
        setattr(torch.cuda, name, _Context)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: 0
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = lambda tensor: tensor
    _note_host_reads()
    _make_constants_by_shape()


def _note_host_reads() -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    def noted(answer: Any) -> Any:
        def read(tensor: FakeTensor) -> Any:
            if tensor.device.type == "cuda":
                HOST_READS[_asker()] += 1
            return answer(tensor)

        return read

    def ones(shape: tuple[int, ...]) -> Any:
        return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0

    FakeTensor.tolist = noted(lambda tensor: ones(tuple(tensor.shape)))
    FakeTensor.item = noted(lambda tensor: 1.0 if tensor.dtype.is_floating_point else 1)
    FakeTensor.__float__, FakeTensor.__int__ = noted(lambda _: 1.0), noted(lambda _: 1)
    FakeTensor.__index__, FakeTensor.__bool__ = noted(lambda _: 1), noted(lambda _: True)


def _asker() -> str:
    frame = sys._getframe(2)
    while frame is not None and "/hopescale/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "?" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def _make_constants_by_shape() -> None:
    """Make tensors of given numbers, and move modules, without asking the device for memory."""
    import torch

    make = torch.tensor

    def tensor(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, *arguments, **options)
        if device is None or torch.device(device).type == "cpu":
            return made
        return torch.empty(tuple(made.shape), dtype=made.dtype, device=device)

    def new_tensor(self: torch.Tensor, data: Any, **options: Any) -> torch.Tensor:
        return tensor(data, device=self.device, dtype=options.get("dtype", self.dtype))

    def to(module: torch.nn.Module, device: Any) -> torch.nn.Module:
        moved: dict[int, torch.nn.Parameter] = {}
        for each in module.modules():
            for name, old in list(each._parameters.items()):
                if old is None:
                    continue
                if id(old) not in moved:
                    new = torch.nn.Parameter(old.detach().to(device))
                    new.__dict__.update(old.__dict__ | new.__dict__)
                    moved[id(old)] = new
                each._parameters[name] = moved[id(old)]
        return module

    torch.tensor, torch.Tensor.new_tensor, torch.nn.Module.to = tensor, new_tensor, to
