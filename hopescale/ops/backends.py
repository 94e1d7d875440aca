"""Which code runs the memories of a model: one answer for configs, plans, runs and operations. Imports no torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from hopescale.ops.cpp import build
from hopescale.ops.limits import BLOCK, KERNEL_DIMS

Backend = Literal["auto", "torch", "triton", "cpp"]
"""Code that a user may ask for; as `train.backend`."""

Recompute = Literal["none", "chunks", "reverse", "memory", "block"]
"""Activations that the backward pass computes again; as `train.recompute`."""

Products = Literal["tf32x3", "tf32", "bf16"]
"""Operands of matrix products in the Triton kernels; sums and states are float32 always."""

KernelPrecision = Literal["auto", "tf32x3", "tf32", "bf16"]
"""Operands that a user may ask for; as `train.kernel_precision`."""

OLDEST_TRITON = (3, 7)
"""Version of Triton that the kernels need."""

_DEVICES = {"triton": "cuda", "cpp": "cpu"}
"""Device of each backend that `auto` takes, the fastest backend first."""


class MemoryShape(NamedTuple):
    """Facts about memories that decide which code can run them.

    Attributes:
        head_dim: Width of a head.
        hidden: Hidden width of MLP memories; None for linear ones.
        chunk_size: Tokens of a chunk of the main memory.
        projection_chunk_size: Tokens of a chunk of the others.
        sequential: Whether chunks follow one another; see `limits.is_sequential`.
    """

    head_dim: int
    hidden: int | None
    chunk_size: int
    projection_chunk_size: int
    sequential: bool


class Choice(NamedTuple):
    """Answer of `select`.

    Attributes:
        backend: Code that runs; None if a backend was asked for and cannot run.
        reason: Reasons against the backends that were passed over; empty if there are none.
    """

    backend: Literal["torch", "triton", "cpp"] | None
    reason: str

    def describe(self, memories: MemoryShape, products: Products) -> str:
        """Say which code runs the memories, how, and why no other; `products` are those of the kernels."""
        how = "all chunks of a sequence in one operation"
        if self.backend == "triton":
            how += f", with {products} products"
        if self.backend == "torch":
            how = "chunk after chunk" if memories.sequential else "all chunks of a sequence side by side"
        return f"{self.backend}, {how}{self.reason and f' (not {self.reason})'}"


def select(
    backend: Backend,
    memories: MemoryShape,
    *,
    device: str | None = None,
    dtype: str = "float32",
    compiled: bool = False,
    recompute: Recompute = "none",
    needs_grad: bool = True,
    whole_chunks: bool = True,
    tokens: int | None = None,
) -> Choice:
    """Choose the code that runs memories over a sequence.

    Args:
        backend: Code that the user asks for; `auto` is the fastest that can run.
        memories: Facts about the memories.
        device: Type of the device, as `ops.device.device_type` has it; None where it is unknown: then any will do.
        dtype: Type of streams and weights.
        compiled: Whether chunks are compiled.
        recompute: Activations that are computed again; `reverse` needs chunks one by one.
        needs_grad: Whether a backward pass follows. Without one the C++ takes any chunks.
        whole_chunks: Whether the sequence begins with a chunk.
        tokens: Tokens of the sequence; None is many. Kernels without gradients run whole chunks: they are compiled for
            numbers of tokens, and those of a few would be compiled in the midst of a text.
    """
    if backend == "torch":
        return Choice("torch", "")
    rejected = []
    for name, usual in _DEVICES.items() if backend == "auto" else [(backend, device)]:
        short = tokens is not None and tokens < memories.chunk_size
        loop = _pass_reason(name, needs_grad, whole_chunks, short)
        if loop:
            reason = loop
        elif device not in (None, usual):
            reason = f"the device is {device}"
        else:
            reason = _chunk_reason(memories, compiled, recompute) if needs_grad or name == "triton" else None
            widths = {"heads": memories.head_dim, "memories": memories.hidden}
            reason = reason or unsupported_reason(name, device, dtype, **widths)
        if reason is None:
            return Choice(name, "; ".join(rejected))
        if backend != "auto" and reason is not loop:
            return Choice(None, reason)
        rejected.append(f"{name}: {reason}")
    return Choice("torch", "; ".join(rejected))


def choose_products(wanted: KernelPrecision, dtype: str) -> Products:
    """Choose the operands of the kernels' products for a model that computes in `dtype`; `auto` loses no precision."""
    if wanted == "auto":
        return "bf16" if dtype == "bfloat16" else "tf32x3"
    return wanted


def select_streams(backend: Backend, head_dim: int, device: str, dtype: str) -> Literal["torch", "cpp"]:
    """Choose the code that cuts projected inputs into streams of heads, for every pass and backend of chunks."""
    if backend == "torch" or unsupported_reason("cpp", device, dtype, heads=head_dim):
        return "torch"
    return "cpp"


def select_fused(backend: Backend, device: str, dtype: str, head_dim: int | None = None) -> Literal["torch", "triton"]:
    """Choose the code of norms, gates and streams around memories, by type; `head_dim` where there are heads."""
    odd = head_dim is not None and head_dim not in KERNEL_DIMS
    if backend not in ("auto", "triton") or odd or dtype not in ("bfloat16", "float32"):
        return "torch"
    if backend == "auto" and device != "cuda":
        return "torch"
    return "torch" if _triton_problem(device) else "triton"


def _pass_reason(backend: str, needs_grad: bool, whole_chunks: bool, short: bool) -> str | None:
    """Return why a kind of code cannot run a pass with any memories; None if it can."""
    if backend == "cpp" and not needs_grad:
        return None
    if short and not needs_grad:
        return "the tokens are less than a chunk"
    return None if whole_chunks else "the sequence begins within a chunk"


def _chunk_reason(memories: MemoryShape, compiled: bool, recompute: Recompute) -> str | None:
    """Return why chunks must be run one by one, None if they need not."""
    if compiled:
        return "train.compile takes the chunk loop"
    if recompute == "reverse":
        return "train.recompute: reverse takes the chunk loop"
    if memories.projection_chunk_size != memories.chunk_size:
        return f"projection_chunk_size is {memories.projection_chunk_size}, chunk_size {memories.chunk_size}"
    return None


def unsupported_reason(
    backend: Literal["triton", "cpp"], device: str | None, dtype: str = "float32", **widths: int | None
) -> str | None:
    """Return why code of a kind cannot run on a device, None if it can. May compile the C++.

    Triton kernels run on NVIDIA GPUs, and anywhere in Triton's interpreter, which `TRITON_INTERPRET=1` turns on.

    Args:
        backend: Kind of code.
        device: Type of the device; None asks about types and widths alone.
        dtype: Type of the tensors.
        widths: Widths by the name of the part that has them; None for a part without.
    """
    known = {name: width for name, width in widths.items() if width is not None}
    if backend == "triton":
        if dtype != "float32":
            return f"the kernels compute in float32, not {dtype}"
        if odd := [f"{name} are {width} wide" for name, width in known.items() if width not in KERNEL_DIMS]:
            return f"{' and '.join(odd)}, not {', '.join(map(str, KERNEL_DIMS[:-1]))} or {KERNEL_DIMS[-1]}"
        return None if device is None else _triton_problem(device)
    if odd := [f"{name} are {width} wide" for name, width in known.items() if width % BLOCK]:
        return f"{' and '.join(odd)}, not a multiple of {BLOCK}"
    if dtype != "float32" or device not in (None, "cpu"):
        return f"the C++ is for float32 on a CPU, not {dtype} on {device}"
    return None if device is None else build.problem()


def _triton_problem(device: str) -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _installation_problem()
    if device != "cuda":
        return f"the kernels need an NVIDIA GPU, Ampere or later, the device is {device}"
    return _installation_problem() or _launcher_problem()


@cache
def _installation_problem() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed (pip install 'hopescale[triton]')"
    if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON:
        return f"the kernels need triton {'.'.join(map(str, OLDEST_TRITON))}, {installed} is installed"
    return None


@cache
def _launcher_problem() -> str | None:
    """Return what Triton lacks to compile the C that launches a kernel; None if it has all."""
    named = shlex.split(os.environ.get("CC", ""))
    if not any(shutil.which(name) for name in (named[:1] or ("clang", "gcc"))):
        looked = named[0] if named else "clang and gcc"
        return f"triton needs a C compiler to launch kernels, looked for {looked}; CC names another"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.exists() else f"triton needs Python's headers to launch kernels, {header} is missing"
