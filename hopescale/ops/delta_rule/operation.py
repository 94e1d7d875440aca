"""The delta rule by torch's operations, or by Triton kernels."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from hopescale.ops.backends import unsupported_reason
from hopescale.ops.delta_rule.chunked import delta_rule_chunked
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read
from hopescale.ops.device import device_type

DeltaRuleBackend = Literal["torch", "triton"]


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
    backend: DeltaRuleBackend = "torch",
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
        backend: Code that computes: torch's operations, or Triton kernels.

    Raises:
        ValueError: If shapes disagree, `read` or `backend` is unknown, `chunk_size < 1`, `momentum` comes without `mu`,
            or `backend` is `triton` where the kernels cannot run, or of shapes that they do not know.
    """
    if backend not in get_args(DeltaRuleBackend):
        raise ValueError(f"backend is {backend!r}, not one of {', '.join(get_args(DeltaRuleBackend))}")
    settings = {"q": q, "mu": mu, "momentum": momentum, "erase": erase, "read": read, "chunk_size": chunk_size}
    if backend == "torch":
        return delta_rule_chunked(k, u, eta, alpha, state, **settings)
    if reason := unsupported_reason("triton", device_type(k.device)):
        raise ValueError(f"backend is 'triton', but {reason}")
    from hopescale.ops.delta_rule.triton import delta_rule_triton

    return delta_rule_triton(k, u, eta, alpha, state, **settings)
