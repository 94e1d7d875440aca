"""Which implementation of the delta rule runs: torch's operations, or Triton kernels."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch
from torch import Tensor

from hopescale.ops.delta_rule.chunked import delta_rule_chunked
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read

Backend = Literal["auto", "torch", "triton"]

KERNEL_DIMS = (16, 32, 64, 128)
"""Head dims that the kernels know."""

LONGEST_BOUNDARY_CHUNK = 64
"""Longest chunk that the kernels read the boundary of."""


OLDEST_TRITON = (3, 3)
"""Version of Triton that the kernels need."""


@cache
def _installation_problem() -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        return f"the kernels need triton {'.'.join(map(str, OLDEST_TRITON))}, {found} is installed"
    return None


def triton_unsupported_reason(device: torch.device) -> str | None:
    """Return what keeps Triton kernels from running on a device, None if nothing does.

    They run on CUDA devices, and anywhere in Triton's interpreter, which `TRITON_INTERPRET=1` turns on.
    """
    if unsupported_reason := _installation_problem():
        return unsupported_reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels need an NVIDIA GPU, the device is {device}"
    return None


def _shape_unsupported_reason(k: Tensor, u: Tensor, state: Tensor, read: Read, chunk_size: int) -> str | None:
    if state.dtype != torch.float32:
        return f"the kernels compute in float32, state is {state.dtype}"
    if k.shape[-1] not in KERNEL_DIMS:
        return f"the kernels know keys of {', '.join(map(str, KERNEL_DIMS))} entries, k has {k.shape[-1]}"
    if u.shape[-1] % KERNEL_DIMS[0]:
        return f"the kernels know values of a multiple of {KERNEL_DIMS[0]} entries, u has {u.shape[-1]}"
    if read == "boundary" and chunk_size > LONGEST_BOUNDARY_CHUNK:
        return (
            f"the kernels read the boundary of chunks up to {LONGEST_BOUNDARY_CHUNK} tokens, chunk_size is {chunk_size}"
        )
    return None


def delta_rule(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: Tensor,
    *,
    q: Tensor | None = None,
    mu: Tensor | None = None,
    momentum: Tensor | None = None,
    erase: bool = True,
    read: Read = "prefix",
    chunk_size: int = 64,
    backend: Backend = "auto",
) -> DeltaRuleOutput:
    """Read and write a linear memory along a sequence.

    Follows `S_t = S_{t-1} (alpha_t I - eta_t k_t k_t^T) + Z_t`, `Z_t = mu_t Z_{t-1} + eta_t u_t k_t^T` (Nested
    Learning, arXiv 2512.24695, Eq. 93 with momentum). Equal to `delta_rule_naive` up to rounding, for any `T >= 0`.

    Args:
        k: Keys `[B, T, H, D]`; unit length keeps the erase bounded.
        u: Write values, minus the inner loss's gradient with respect to the memory's output. `[B, T, H, Do]`.
        eta: Inner learning rate `[B, T, H]`.
        alpha: Retention in `[0, 1]`, `[B, T, H]`.
        state: Memory before the first token `[B, H, Do, D]`, float32 (float64 in tests). Its type is computed in.
        q: Queries like `k`; None if nothing is read.
        mu: Inner momentum in `[0, 1]`, `[B, T, H]`; None for none.
        momentum: `Z` before the first token, like `state`; None is zero. Only with `mu`.
        erase: Whether a write first erases `eta_t k_t k_t^T`; False is plain gradient descent.
        read: State that token t reads: `prefix` is `S_{t-1}`, `inclusive` is `S_t`, `boundary` is the state at the
            start of the token's chunk.
        chunk_size: Tokens per chunk; the last may be shorter. Changes only speed, except for `boundary`.
        backend: `torch`, `triton`, or `auto`: Triton kernels for tensors on a GPU, of shapes they know.

    Raises:
        ValueError: If shapes disagree, `read` or `backend` is unknown, `chunk_size < 1`, `momentum` comes without `mu`,
            or `backend` is `triton` where the kernels cannot run.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(get_args(Backend))}")
    settings = {"q": q, "mu": mu, "momentum": momentum, "erase": erase, "read": read, "chunk_size": chunk_size}
    if backend == "triton" or (backend == "auto" and k.is_cuda):
        unsupported_reason = triton_unsupported_reason(k.device) or _shape_unsupported_reason(
            k, u, state, read, chunk_size
        )
        if unsupported_reason is None:
            from hopescale.ops.delta_rule.triton import delta_rule_triton

            return delta_rule_triton(k, u, eta, alpha, state, **settings)
        if backend == "triton":
            raise ValueError(f"backend is 'triton', but {unsupported_reason}")
    return delta_rule_chunked(k, u, eta, alpha, state, **settings)
