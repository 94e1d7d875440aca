"""The recurrence token by token, as the equations read. Slow; the reference for every faster form."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read, check_arguments, check_gated_arguments


def delta_rule_naive(
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
) -> DeltaRuleOutput:
    """Run the gated delta rule as a loop over tokens. Same arguments, result and errors as `delta_rule`."""
    check_arguments(k, u, eta, alpha, state, q, mu, momentum, read, chunk_size)
    kind = state.dtype
    out_type = (q if q is not None else k).dtype
    k, u, eta, alpha = k.to(kind), u.to(kind), eta.to(kind), alpha.to(kind)
    if mu is not None and momentum is None:
        momentum = torch.zeros_like(state)

    outputs = []
    boundary = state
    for t in range(k.shape[1]):
        if t % chunk_size == 0:
            boundary = state
        before = state
        key, eta_t = k[:, t], eta[:, t, :, None, None]  # [B, H, D], [B, H, 1, 1]
        write = eta_t * u[:, t, :, :, None] * key[:, :, None, :]  # [B, H, Do, D]
        if mu is not None:
            write = momentum = mu[:, t, :, None, None].to(kind) * momentum + write
        state = alpha[:, t, :, None, None] * before + write
        if erase:
            held = torch.einsum("bhod,bhd->bho", before, key)
            state = state - eta_t * held[..., None] * key[:, :, None, :]
        if q is not None:
            source = {"prefix": before, "inclusive": state, "boundary": boundary}[read]
            outputs.append(torch.einsum("bhod,bhd->bho", source, q[:, t].to(kind)))

    output = None
    if q is not None:
        empty = u.new_zeros(u.shape[0], 0, *u.shape[2:])
        output = (torch.stack(outputs, 1) if outputs else empty).to(out_type)  # [B, T, H, Do]
    return DeltaRuleOutput(output, state, momentum)


def gated_delta_rule_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    eta: Tensor | None,
    state: Tensor,
    *,
    erase: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run a decayed delta rule as a loop over tokens. Same arguments, result and errors as `gated_delta_rule`."""
    check_gated_arguments(q, k, v, log_alpha, eta, state, chunk_size)
    kind, shared_by = state.dtype, v.shape[2] // k.shape[2]
    q, k = (x.to(kind).repeat_interleave(shared_by, dim=2) for x in (q, k))
    outputs = []
    for t in range(k.shape[1]):
        state = log_alpha[:, t, :, None, None].to(kind).exp() * state
        write = v[:, t].to(kind)
        if erase:
            write = write - torch.einsum("bhdo,bhd->bho", state, k[:, t])
        if eta is not None:
            write = eta[:, t, :, None].to(kind) * write
        state = state + k[:, t, :, :, None] * write[:, :, None, :]
        outputs.append(torch.einsum("bhdo,bhd->bho", state, q[:, t]))
    return torch.stack(outputs, 1) if outputs else v.to(kind), state
