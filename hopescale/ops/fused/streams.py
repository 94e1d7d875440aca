"""Projected inputs as streams of heads in one kernel, forward and backward: filter, SiLU, unit norm, gates' logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.short_conv import document_tail

TOKENS = 32
"""Tokens of a program, which has its own sums of the weights' gradients."""
SLICES = 3
"""Slices that become streams: keys, values, queries."""
EPS = 1e-6
"""Term added under the root of a unit norm; as in `ops.norm.l2_norm`."""


@triton.jit
def _filtered(
    x, filters, tail, t, tokens, start, channel, batch, b, channels, token_stride, inputs,
    WIDTH: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return filtered inputs of tokens `t` `[n, 1]`; `start` has the first token that each may read."""
    d = tl.arange(0, D)[None, :]
    inside = (t >= 0) & (t < tokens)
    if WIDTH == 0:
        return tl.load(x + inputs + t * token_stride + d, mask=inside, other=0.0).to(tl.float32)
    value = tl.zeros([t.shape[0], D], tl.float32)
    for lag in tl.static_range(WIDTH):
        place = t - lag
        seen = inside & (place >= start)
        one = tl.load(x + inputs + place * token_stride + d, mask=seen & (place >= 0), other=0.0).to(tl.float32)
        if TAIL:
            before = ((WIDTH - 1 + place) * batch + b) * channels + channel + d
            one += tl.load(tail + before, mask=seen & (place < 0), other=0.0).to(tl.float32)
        value += one * tl.load(filters + (channel + d) * WIDTH + (WIDTH - 1 - lag)).to(tl.float32)
    return value


@triton.jit
def _start_of(first, t, tokens, b, WIDTH: tl.constexpr, CUT: tl.constexpr):
    if CUT:
        return tl.load(first + b * tokens + t, mask=(t >= 0) & (t < tokens), other=0).to(tl.int64)
    return tl.zeros_like(t) - WIDTH


@triton.jit
def _forward(
    x, filters, tail, first, gate_weights, gate_biases, streams, logits,
    tokens, batch, heads, token_stride, batch_stride, head_stride, slice_stride, unit, eps,
    GATES: tl.constexpr, STATIC: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    CUT: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = row // heads, row % heads
    t = (tl.program_id(0) * SIZE + tl.arange(0, SIZE))[:, None].to(tl.int64)
    d = tl.arange(0, D)[None, :]
    inside = t < tokens
    start = _start_of(first, t, tokens, b, WIDTH, CUT)
    channel, channels = (h * SLICES + part) * D, heads * SLICES * D
    inputs = b * batch_stride + h * head_stride + part * slice_stride
    value = _filtered(
        x, filters, tail, t, tokens, start, channel, batch, b, channels, token_stride, inputs, WIDTH, TAIL, D
    )
    if WIDTH:
        value = value * tl.sigmoid(value)
    if (unit >> part) & 1:
        value = value * tl.rsqrt(tl.sum(value * value, axis=1) + eps)[:, None]
    place = ((part * batch * heads + row) * tokens + t) * D + d
    tl.store(streams + place, value.to(streams.dtype.element_ty), mask=inside)
    if part == 0:
        for gate in tl.static_range(GATES):
            found = tl.zeros([SIZE, 1], tl.float32) + tl.load(gate_biases[gate] + h)
            if (STATIC >> gate) & 1:
                found += tl.sum(value * tl.load(gate_weights[gate] + h * D + d), axis=1)[:, None]
            tl.store(logits + (gate * batch * heads + row) * tokens + t, found, mask=inside)


@triton.jit
def _back_at(
    x, filters, tail, first, gate_weights, d_k, d_v, d_q, d_logits,
    t, tokens, batch, heads, b, h, row, part, token_stride, inputs, unit, eps,
    GATES: tl.constexpr, STATIC: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
    CUT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the gradient of filtered inputs of tokens `t` `[n, 1]`, zero outside, their streams, and their starts."""
    d = tl.arange(0, D)[None, :]
    inside = (t >= 0) & (t < tokens)
    start = _start_of(first, t, tokens, b, WIDTH, CUT)
    channel, channels = (h * SLICES + part) * D, heads * SLICES * D
    value = _filtered(
        x, filters, tail, t, tokens, start, channel, batch, b, channels, token_stride, inputs, WIDTH, TAIL, D
    )
    share = tl.sigmoid(value)
    y = value
    if WIDTH:
        y = value * share
    place = (row * tokens + t) * D + d
    given = tl.load(d_k + place, mask=inside & (part == 0), other=0.0).to(tl.float32)
    given += tl.load(d_v + place, mask=inside & (part == 1), other=0.0).to(tl.float32)
    given += tl.load(d_q + place, mask=inside & (part == 2), other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
    stream = y
    if (unit >> part) & 1:
        stream = y * root
    if part == 0:
        for gate in tl.static_range(GATES):
            if (STATIC >> gate) & 1:
                d_logit = tl.load(d_logits[gate] + row * tokens + t, mask=inside, other=0.0)
                given += d_logit * tl.load(gate_weights[gate] + h * D + d)
    if (unit >> part) & 1:
        given = root * (given - stream * tl.sum(stream * given, axis=1)[:, None])
    if WIDTH:
        given = given * share * (1 + value * (1 - share))
    return tl.where(inside, given, 0.0), stream, start


@triton.jit
def _backward(
    x, filters, tail, first, gate_weights, d_k, d_v, d_q, d_logits, d_rest,
    d_x, sums, row_size,
    tokens, batch, heads, token_stride, batch_stride, head_stride, slice_stride, unit, eps,
    GATES: tl.constexpr, STATIC: tl.constexpr, SLICES: tl.constexpr, ALL: tl.constexpr, WIDTH: tl.constexpr,
    TAIL: tl.constexpr, CUT: tl.constexpr,
    SIZE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tiles begin with the tail, whose inputs count in the gradient of the filters.

    Every tile of every sequence has a row of `sums`: filters `[channels, WIDTH]`, then weights `[H, D]` of gates that
    have them, then biases `[GATES, H]`.
    """
    row, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = row // heads, row % heads
    t = (tl.program_id(0) * SIZE + tl.arange(0, SIZE))[:, None].to(tl.int64)
    if WIDTH:
        t = t - (WIDTH - 1)
    d = tl.arange(0, D)[None, :]
    inside = (t >= 0) & (t < tokens)
    place = (((t * batch + b) * heads + h) * ALL + part) * D + d
    if part >= SLICES:
        rest = tl.load(d_rest + ((t * batch + b) * heads + h) * D + d, mask=inside, other=0.0)
        tl.store(d_x + place, rest.to(d_x.dtype.element_ty), mask=inside)
    else:
        own = sums + (tl.program_id(0).to(tl.int64) * batch + b) * row_size
        inputs = b * batch_stride + h * head_stride + part * slice_stride
        channel, channels = (h * SLICES + part) * D, heads * SLICES * D
        one = tl.load(x + inputs + t * token_stride + d, mask=inside, other=0.0).to(tl.float32)
        if TAIL:
            before = ((WIDTH - 1 + t) * batch + b) * channels + channel + d
            one += tl.load(tail + before, mask=t < 0, other=0.0).to(tl.float32)
        d_input = tl.zeros([SIZE, D], tl.float32)
        for lag in range(WIDTH if WIDTH else 1):
            back, stream, start = _back_at(
                x, filters, tail, first, gate_weights, d_k, d_v, d_q, d_logits,
                t + lag, tokens, batch, heads, b, h, row, part, token_stride, inputs, unit, eps,
                GATES, STATIC, SLICES, WIDTH, TAIL, CUT, D,
            )  # fmt: skip
            if WIDTH:
                back = tl.where(start <= t, back, 0.0)
                tap = WIDTH - 1 - lag
                d_input += back * tl.load(filters + (channel + d) * WIDTH + tap).to(tl.float32)
                tl.store(own + (channel + tl.arange(0, D)) * WIDTH + tap, tl.sum(back * one, axis=0))
            else:
                d_input += back
            if (part == 0) & (lag == 0):
                spot = own + channels * WIDTH
                for gate in tl.static_range(GATES):
                    d_logit = tl.load(d_logits[gate] + row * tokens + t, mask=inside, other=0.0)
                    if (STATIC >> gate) & 1:
                        tl.store(spot + h * D + tl.arange(0, D), tl.sum(d_logit * stream, axis=0))
                        spot += heads * D
                    tl.store(own + row_size - (GATES - gate) * heads + h, tl.sum(d_logit))
        tl.store(d_x + place, d_input.to(d_x.dtype.element_ty), mask=inside)


class _Layout(NamedTuple):
    """Facts about a call that both passes need.

    Attributes:
        unit: A bit for each stream: whether its vectors are scaled to unit length.
        width: Taps of the filter; 0 for none.
        gates: Gates, each with a bias.
        static: A bit for each gate: whether it has weights.
    """

    unit: int
    width: int
    gates: int
    static: int

    def sizes(self, x: Tensor) -> tuple[int | float, ...]:
        tokens, batch, heads, _, _ = x.shape
        return (tokens, batch, heads, *x.stride()[:4], self.unit, EPS)

    def constants(self, x: Tensor, tail: Tensor | None, first: Tensor | None) -> dict[str, int | bool]:
        constants = {"GATES": self.gates, "STATIC": self.static, "SLICES": SLICES, "WIDTH": self.width}
        return constants | {"TAIL": tail is not None, "CUT": first is not None, "SIZE": TOKENS, "D": x.shape[-1]}

    def gradients(self, sums: Tensor, heads: int, dim: int) -> tuple[Tensor | None, ...]:
        """Cut a row of sums into gradients: of filters, of each gate's weights, of each gate's bias."""
        static = [bool(self.static >> gate & 1) for gate in range(self.gates)]
        sizes = [heads * SLICES * dim * self.width, *(heads * dim * one for one in static), *[heads] * self.gates]
        filters, *parts = sums.split(sizes)
        weights = [part.view(heads, dim) if has else None for part, has in zip(parts, static, strict=False)]
        return filters.view(-1, self.width) if self.width else None, *weights, *parts[self.gates :]


class _StreamsAndGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: _Layout,
        x: Tensor,
        filters: Tensor | None,
        tail: Tensor | None,
        first: Tensor | None,
        *gates: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tokens, batch, heads, _, dim = x.shape
        streams = torch.empty(SLICES, batch, heads, tokens, dim, dtype=torch.float32, device=x.device)
        logits = torch.empty(layout.gates, batch, heads, tokens, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(tokens, TOKENS), batch * heads, SLICES)
        biases = gates[layout.gates :]
        weights = tuple(bias if one is None else one for one, bias in zip(gates, biases, strict=False))
        given = (x, filters, tail, first, weights, biases, streams, logits)
        _forward[grid](*given, *layout.sizes(x), **layout.constants(x, tail, first), num_warps=4)
        ctx.save_for_backward(x, filters, tail, first, *weights)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return *streams.unbind(), *logits.unbind(), x[..., SLICES:, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        x, filters, tail, first, *weights = ctx.saved_tensors
        layout: _Layout = ctx.layout
        tokens, batch, heads, slices, dim = x.shape
        new = {"dtype": torch.float32, "device": x.device}
        shapes = [(batch, heads, tokens, dim)] * SLICES + [(batch, heads, tokens)] * layout.gates
        *streams, d_rest = given
        pairs = zip(streams, shapes, strict=True)
        streams = [torch.zeros(*shape, **new) if one is None else one.contiguous() for one, shape in pairs]
        if slices == SLICES:
            d_rest = x  # no program reads it
        else:
            rest = (tokens, batch, heads, slices - SLICES, dim)
            d_rest = x.new_zeros(rest) if d_rest is None else d_rest.contiguous()
        parts = triton.cdiv(tokens + max(0, layout.width - 1), TOKENS)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        size = heads * (SLICES * dim * layout.width + layout.gates + dim * layout.static.bit_count())
        sums = torch.empty(parts * batch, size, **new)
        given = (x, filters, tail, first, tuple(weights), *streams[:SLICES], tuple(streams[SLICES:]))
        given += (d_rest, d_x, sums, size)
        constants = layout.constants(x, tail, first) | {"ALL": slices}
        _backward[parts, batch * heads, slices](*given, *layout.sizes(x), **constants, num_warps=8)
        d_filters, *d_gates = layout.gradients(sums.sum(0), heads, dim)
        return None, d_x, d_filters, None, None, *d_gates


def head_streams_and_gates(
    x: Tensor,
    filters: Tensor | None,
    tail: Tensor | None,
    unit: Sequence[bool],
    gates: Sequence[tuple[Tensor | None, Tensor]],
    *,
    first: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor | None]:
    """Cut projected inputs into streams of heads, as `ops.head_streams` does, and take gates' logits from the first.

    Sums are in float32, whatever the type of the inputs. No gradient goes to the given tail.

    Args:
        x: Projected inputs `[T, B, H, P, D]`, whose last dimension lies dense; `D` is a power of 2 and `T` at least 1.
        filters, unit, first: Arguments of `head_streams`, for the first three slices; at most one more is left.
        tail: Inputs before `x`, as in `head_streams`; None for zeros.
        gates: Weights `[H, D]`, or None, and bias `[H]` of each gate, float32.

    Returns:
        Three streams `[B, H, T, D]` in float32, logits `[B, H, T]` of each gate, the slices left `[T, B, H, P - 3, D]`,
        and the tail for the next call.
    """
    after = None
    if filters is not None:
        missing = filters.shape[1] - 1
        last = x[max(0, x.shape[0] - missing) :, ..., :SLICES, :]
        last = last.clone(memory_format=torch.contiguous_format).flatten(2)  # a view would hold on to all inputs
        missing -= last.shape[0]
        if missing:
            before = last.new_zeros(missing, *last.shape[1:]) if tail is None else tail.to(x.dtype)[-missing:]
            last = torch.cat([before, last])
        after = last if first is None else document_tail(last, first)
        filters = filters.contiguous()
        tail = None if tail is None else tail.to(x.dtype).contiguous()
    bits = sum(one << number for number, one in enumerate(unit))
    weights, biases = ([None if one is None else one.contiguous() for one in part] for part in zip(*gates, strict=True))
    static = sum((one is not None) << number for number, one in enumerate(weights))
    layout = _Layout(bits, 0 if filters is None else filters.shape[1], len(gates), static)
    first = None if first is None else first.contiguous()
    *found, rest = _StreamsAndGates.apply(layout, x, filters, tail, first, *weights, *biases)
    return tuple(found[:SLICES]), tuple(found[SLICES:]), rest, after
