"""Causal depthwise convolution over a few tokens, with its last inputs carried from call to call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ConvSilu(torch.autograd.Function):
    """Convolves time-first inputs and applies SiLU: one pass per tap, nothing transposed.

    `age` `[T, B, 1]` counts the tokens of a token's document before it.
    """

    @staticmethod
    def forward(ctx: Any, tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, age: Tensor | None) -> Tensor:
        padded = torch.cat([tail, x])  # [W - 1 + T, B, N]
        ctx.save_for_backward(padded, weight, bias, age)
        mixed = _convolve(padded, weight, bias, age)
        return mixed.mul_(torch.sigmoid(mixed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, bias, age = ctx.saved_tensors
        width, tokens = weight.shape[1], grad.shape[0]
        d_mixed = torch.ops.aten.silu_backward(grad.contiguous(), _convolve(padded, weight, bias, age))
        d_padded, taps = torch.zeros_like(padded), []
        for tap in range(width):
            reaching = _reaching(d_mixed, age, width - 1 - tap)
            d_padded[tap : tap + tokens].addcmul_(reaching, weight[:, tap])
            taps.append((reaching * padded[tap : tap + tokens]).sum((0, 1)))
        # A view of the first rows would hold on to all, for as long as the call before waits for its turn.
        d_tail, d_x = d_padded[: width - 1].clone(), d_padded[width - 1 :]
        return d_tail, d_x, torch.stack(taps, dim=1), None if bias is None else d_mixed.sum((0, 1)), None


def _reaching(x: Tensor, age: Tensor | None, lag: int) -> Tensor:
    """Return `x` `[T, B, N]`, zero at tokens whose document has no token `lag` tokens before them."""
    return x if age is None or lag == 0 else x * (age >= lag)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, age: Tensor | None) -> Tensor:
    width = weight.shape[1]
    tokens = padded.shape[0] - width + 1
    mixed = _reaching(padded[:tokens], age, width - 1) * weight[:, 0]
    for tap in range(1, width):
        mixed.addcmul_(_reaching(padded[tap : tap + tokens], age, width - 1 - tap), weight[:, tap])
    return mixed if bias is None else mixed.add_(bias)


def short_conv(
    x: Tensor, weight: Tensor, tail: Tensor, first: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve each channel over time and apply SiLU.

    Args:
        x: Inputs, time first: `[T, B, N]`.
        weight: One filter per channel, oldest token first: `[N, W]`.
        tail: The `W - 1` inputs before `x`: `[W - 1, B, N]`.
        first: Place of the first token of each token's document `[B, T]`, int32; inputs before it count as zeros. None
            takes all tokens for one document, the tail included.
        bias: Numbers added before SiLU `[N]`; None adds nothing.

    Returns:
        Outputs `[T, B, N]` and the tail for the next call, zeros where it lies before the last document.
    """
    tail, age = tail.to(x.dtype), None
    if first is not None:
        age = (torch.arange(len(x), device=x.device) - first).T[..., None]
    return _ConvSilu.apply(tail, x, weight, bias, age), _after(tail, x, first)


def linear_conv(
    x: Tensor, weight: Tensor, tail: Tensor, first: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve each channel over time as `short_conv` does, but apply no SiLU."""
    tail, width = tail.to(x.dtype), weight.shape[1]
    padded = torch.cat([tail, x])
    age = None if first is None else (torch.arange(len(x), device=x.device) - first).T[..., None]
    taps = (padded[tap : tap + len(x)] for tap in range(width))
    mixed = sum(_reaching(one, age, width - 1 - tap) * weight[:, tap] for tap, one in enumerate(taps))
    return mixed if bias is None else mixed + bias, _after(tail, x, first)


def _after(tail: Tensor, x: Tensor, first: Tensor | None) -> Tensor:
    """Return the tail for the next call, which does not hold on to the inputs."""
    last = x[max(0, len(x) - len(tail)) :]
    after = torch.cat([tail, last])[len(last) :]
    return after if first is None else document_tail(after, first)


def document_tail(tail: Tensor, first: Tensor) -> Tensor:
    """Clear of the last inputs `[W - 1, B, N]` those that lie before the last document of their sequence."""
    tokens = first.shape[1]
    places = torch.arange(tokens - len(tail), tokens, device=first.device)
    return tail * (places[:, None] >= first[:, -1])[..., None]
