"""Result and argument checks shared by the closed form and its naive twin."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Read = Literal["prefix", "inclusive", "boundary"]


class DeltaRuleOutput(NamedTuple):
    """Result of the delta rule.

    Attributes:
        output: Read values `[B, T, H, Do]` in the type of `q`; None without queries.
        state: Memory after the last token, `[B, H, Do, D]`, in the type of the given state.
        momentum: Momentum after the last token, like `state`; None without `mu`.
    """

    output: Tensor | None
    state: Tensor
    momentum: Tensor | None


def check_arguments(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: Tensor,
    q: Tensor | None,
    mu: Tensor | None,
    momentum: Tensor | None,
    read: str,
    chunk_size: int,
) -> None:
    """Check the arguments of `delta_rule` against each other.

    Raises:
        ValueError: Naming the argument, what it is and what it must be.
    """
    if k.dim() != 4 or u.dim() != 4:
        raise ValueError(f"k and u have the shape [B, T, H, D], but theirs are {tuple(k.shape)} and {tuple(u.shape)}")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}, but memories are kept in float32 (float64 in tests)")
    batch, tokens, heads, dim = k.shape
    gate = (batch, tokens, heads)
    memory = (batch, heads, u.shape[-1], dim)
    expected = {
        "u": (u, (*gate, u.shape[-1])),
        "eta": (eta, gate),
        "alpha": (alpha, gate),
        "state": (state, memory),
        "q": (q, tuple(k.shape)),
        "mu": (mu, gate),
        "momentum": (momentum, memory),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but k {tuple(k.shape)} asks for {shape}")
    if read not in get_args(Read):
        raise ValueError(f"read is {read!r}, not one of {', '.join(get_args(Read))}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but a chunk has at least one token")
    if momentum is not None and mu is None:
        raise ValueError("momentum is given without mu, so it would have no effect")


def check_gated_arguments(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, eta: Tensor | None, state: Tensor, chunk_size: int
) -> None:
    """Check the arguments of `gated_delta_rule` against each other.

    Raises:
        ValueError: Naming the argument, what it is and what it must be.
    """
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"k and v have the shape [B, T, H, D], but theirs are {tuple(k.shape)} and {tuple(v.shape)}")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"state is {state.dtype}, but memories are kept in float32 (float64 in tests)")
    batch, tokens, groups, dim = k.shape
    heads = v.shape[2]
    if heads % groups:
        raise ValueError(f"v has {heads} heads, but k has {groups}, which does not divide them")
    gate = (batch, tokens, heads)
    expected = {
        "q": (q, tuple(k.shape)),
        "v": (v, (*gate, v.shape[-1])),
        "log_alpha": (log_alpha, gate),
        "eta": (eta, gate),
        "state": (state, (batch, heads, dim, v.shape[-1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but k {tuple(k.shape)} asks for {shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but a chunk has at least one token")
