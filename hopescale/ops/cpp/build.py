"""The shared library of this folder's C++: compiled for this machine on first use, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


class BuildError(Exception):
    """Why there is no library, in one clause."""


def compiler() -> str | None:
    """Return the C++ compiler: what the environment variable CXX names, else the first of the usual names."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ("c++", "g++", "clang++")) if (found := shutil.which(name))), None
    )


@cache
def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what keeps the C++ from tensors of a type on a device, None if nothing does. May compile it."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"the C++ is for float32 on a CPU, not {str(dtype).removeprefix('torch.')} on {device}"
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Load the library, after compiling it if no earlier process has for this source, compiler and processor.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """
    path = _cache() / f"ops-{_digest()}.so"
    if not path.exists():
        _compile(path)
    return ctypes.CDLL(str(path))


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopescale"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / f"hopescale-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
    return root


def _digest() -> str:
    """Name what a library depends on: two machines that share a cache may have different processors."""
    digest = hashlib.sha256(" ".join((*FLAGS, str(compiler()), platform.machine(), _processor())).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(path: Path) -> None:
    found = compiler()
    if found is None:
        raise BuildError("there is no C++ compiler: neither c++, g++ nor clang++, nor what CXX names")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [found, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            raise BuildError(f"{found} could not compile {SOURCES.name}: {first}")
        made.replace(path)
