"""Writes of MLP memories for keys and values: the gradient of their inner loss, layer by layer, and its derivative.

A memory answers `M(z) = z + silu(z W2) W1` (gate memories, which answer with one number, without `z`). The gradient of
the inner loss at the key gives every layer a key and a write value (Nested Learning, section 4.5 and Eq. 93).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopescale.ops.self_modifying.types import MemorySpec


class MlpWrites(NamedTuple):
    """Keys and write values of the layers of `N` MLP memories.

    Attributes:
        first: Write values of the first layers, `[B, H, C, N * E]`.
        keys: Keys of the second layers, of unit length or less, `[B, H, N, C, E]`.
        values: Write values of the second layers, `[B, H, N, C, Do]`.
        surprise: Norm of each token's error `[B, H, N, C]`, without a gradient.
    """

    first: Tensor
    keys: Tensor
    values: Tensor
    surprise: Tensor


_TINY = 1e-30
"""Squared length that counts as 0: what divides by it has none itself."""


def capped(error: Tensor, cap: float | None) -> Tensor:
    """Scale errors `[..., Do]` to a norm of at most `cap`."""
    if cap is None:
        return error
    return error * (cap * torch.rsqrt(error.square().sum(-1, keepdim=True) + 1e-12)).clamp_max(1.0)


class _MlpWrites(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, w1: Tensor, k: Tensor | None, v: Tensor | None, fresh: Tensor | None, spec: MemorySpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        memories, width = w1.shape[2:4]
        pre = pre.unflatten(-1, (memories, width)).transpose(2, 3)  # [B, H, N, C or 2 C, E]
        pre = pre.contiguous()
        gate = torch.sigmoid(pre)
        hidden = pre * gate
        tokens = pre.shape[3] // (2 if spec.own_target else 1)
        of_key = hidden[..., :tokens, :]
        asked, error = _asked(hidden, tokens, spec), None
        if asked is not None:
            error = asked @ w1
        if v is not None:
            offset = (k - v if spec.objective == "l2" else -v)[:, :, None]
            error = offset.expand(*w1.shape[:3], *v.shape[2:]) if error is None else error.add_(offset)
        raw = error
        push = error = capped(raw, spec.error_cap)
        surprise = torch.linalg.vector_norm(push, dim=-1)
        if fresh is not None:
            push = error * fresh[:, :, None, :, None]
        norm = torch.sqrt(torch.linalg.vector_norm(of_key, dim=-1, keepdim=True).square_().add_(spec.key_eps))
        keys = of_key / norm
        back = push @ w1.mT
        first = -back * _slope(gate, hidden)[..., :tokens, :]
        if spec.normalize_writes:
            first = first * _shrink(first, push)
        first = first.transpose(2, 3).contiguous()
        ctx.save_for_backward(pre, w1, gate, hidden, asked, raw, error, push, norm, keys, back, fresh)
        ctx.spec, ctx.vector_memories = spec, v is not None
        ctx.mark_non_differentiable(surprise)
        return first.flatten(3), keys, -_written(norm, spec) * push, surprise

    @staticmethod
    def backward(ctx: Any, d_first: Tensor, d_keys: Tensor, d_values: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        pre, w1, gate, hidden, asked, raw, error, push, norm, keys, back, fresh = ctx.saved_tensors
        spec, tokens = ctx.spec, keys.shape[3]
        slope = _slope(gate, hidden)
        d_first = d_first.unflatten(-1, w1.shape[2:4]).transpose(2, 3)
        d_first = d_first.contiguous()
        d_norm = -(push * d_values).sum(-1, keepdim=True)
        d_shrunk = None
        if spec.normalize_writes:
            d_first, d_shrunk = _shrink_back(-back * slope[..., :tokens, :], push, d_first)
            d_norm = torch.where(norm > 1, -d_norm / norm.square(), d_norm)
        d_back = -d_first * slope[..., :tokens, :]
        d_push = (d_back @ w1).addcmul_(_written(norm, spec), d_values, value=-1)
        d_push = d_push if d_shrunk is None else d_push + d_shrunk
        d_w1 = d_back.mT @ push
        d_norm -= (d_keys * keys).sum(-1, keepdim=True) / norm
        d_error, d_fresh = d_push, None
        if fresh is not None:
            d_fresh = (d_push * error).sum((2, 4))
            d_error = d_push.mul_(fresh[:, :, None, :, None])
        if spec.error_cap is not None:
            square = raw.square().sum(-1, keepdim=True) + 1e-12
            scale = spec.error_cap * square.rsqrt()
            along = raw * ((raw * d_error).sum(-1, keepdim=True) / square)
            d_error = torch.where(scale < 1, scale * (d_error - along), d_error)
        d_hidden = torch.zeros_like(hidden)
        if asked is not None:
            d_w1 = torch.baddbmm(d_w1.flatten(0, 2), asked.mT.flatten(0, 2), d_error.flatten(0, 2)).view(w1.shape)
            d_asked = d_error @ w1.mT
            if spec.objective == "l2":
                d_hidden[..., :tokens, :] = d_asked
            if spec.own_target:
                d_hidden[..., tokens:, :] = -d_asked
        of_key = d_hidden[..., :tokens, :]
        of_key.addcdiv_(d_keys, norm).addcmul_(d_norm, keys)
        d_hidden.mul_(slope)
        # The slope itself depends on the first layer's result: its derivative is that of silu taken twice.
        at_key, open_ = pre[..., :tokens, :], gate[..., :tokens, :]
        bend = (1 - 2 * open_).mul_(at_key).add_(2).mul_(open_ * (1 - open_))
        of_key.addcmul_(bend.mul_(back), d_first, value=-1)
        d_pre = d_hidden.transpose(2, 3).contiguous()
        total = d_error.sum(2) if ctx.vector_memories else None
        d_k = total if ctx.vector_memories and spec.objective == "l2" else None
        return d_pre.flatten(3), d_w1, d_k, None if total is None else -total, d_fresh, None


def _asked(hidden: Tensor, tokens: int, spec: MemorySpec) -> Tensor | None:
    """Return the second layer's input for the error: hidden activations of the key minus those of the value."""
    if spec.objective == "l2":
        of_key = hidden[..., :tokens, :]
        return of_key - hidden[..., tokens:, :] if spec.own_target else of_key
    return -hidden[..., tokens:, :] if spec.own_target else None


def _written(norm: Tensor, spec: MemorySpec) -> Tensor:
    """Return the length with which second layers are written under keys that were `norm` long."""
    return torch.minimum(norm, 1 / norm) if spec.normalize_writes else norm


def _shrink(first: Tensor, push: Tensor) -> Tensor:
    """Return factors that make writes of first layers `[..., E]` smaller, where they amplify `push` by more than 1."""
    return 1 / (first.square().sum(-1, keepdim=True) / _square(push)).clamp_min(1)


def _square(push: Tensor) -> Tensor:
    """Return squared lengths, not 0."""
    return push.square().sum(-1, keepdim=True).clamp_min(_TINY)


def _shrink_back(first: Tensor, push: Tensor, d_first: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the gradient of writes that were made smaller into that of `first`, the writes before, and of `push`."""
    scale, along = _shrink(first, push), (d_first * first).sum(-1, keepdim=True)
    over = torch.where(scale < 1, 2 * along * scale / _square(push), 0)
    return scale * (d_first - over * first), over * push


def _slope(gate: Tensor, hidden: Tensor) -> Tensor:
    """Return the derivative of silu, `gate + hidden (1 - gate)`."""
    return torch.addcmul(gate + hidden, hidden, gate, value=-1)


def mlp_writes(
    pre: Tensor,
    w1: Tensor,
    *,
    residual: tuple[Tensor, Tensor] | None,
    fresh: Tensor | None,
    spec: MemorySpec,
) -> MlpWrites:
    """Compute the writes of `N` MLP memories, from their first layers' results.

    Differentiable once in all tensors. A write is the gradient at the weights that a chunk begins with, and what like
    keys write in a chunk adds up to one such write. Where the layer amplifies an error by more than 1, that is more
    than was to be corrected, by the square of the factor, and the weights grow from chunk to chunk. With
    `spec.normalize_writes` such a write is divided by that square, as normalised least mean squares does (Nagumo and
    Noda, 1967): by the squared length of a second layer's key, and for the first layer by that of its gradient over
    that of the error.

    Args:
        pre: First layers' results for the keys `[B, H, C, N * E]`; `[B, H, 2 C, N * E]` with those for the values after
            them if targets are the memories' own.
        w1: Second layers, transposed `[B, H, N, E, Do]`.
        residual: Keys and values `[B, H, C, Do]` of memories that add their input; None for those that do not.
        fresh: Factor on every write `[B, H, C]`; None is 1.
        spec: Memories, whose inner loss is differentiated.

    Raises:
        ValueError: If values are to be the targets and are not given.
    """
    if residual is None and not spec.own_target:
        raise ValueError("targets are the values, but residual is None: gate memories make their own targets")
    return MlpWrites(*_MlpWrites.apply(pre, w1, *(residual or (None, None)), fresh, spec))
