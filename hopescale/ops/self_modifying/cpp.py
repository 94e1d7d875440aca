"""The chunks of a sequence as one differentiable operation, computed in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hopescale.ops.cpp import LANES, library, pointer, pointers, share_out
from hopescale.ops.self_modifying.types import ChunkRule, ChunksOutput, Streams, Weights

_READS = ("prefix", "inclusive", "boundary")


class _Rule(ctypes.Structure):
    """`Rule` of rule.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dim", "hidden", "wide", "narrow", "chunk")),
        *((f"of_{name}", ctypes.c_int32) for name in ("k", "v", "q", "eta", "alpha")),
        *((name, ctypes.c_int32) for name in ("retention", "momentum", "l2", "own_target", "erase", "read")),
        *((name, ctypes.c_float) for name in ("error_cap", "key_eps", "eta_max")),
    ]

    @classmethod
    def of(cls, rule: ChunkRule, streams: Streams) -> _Rule:
        memories = {name: number for number, name in enumerate(rule.wide + rule.narrow)}
        return cls(
            streams.k.shape[-1],
            rule.hidden or 0,
            len(rule.wide),
            len(rule.narrow),
            min(rule.chunk_size, streams.k.shape[2]),
            *(memories.get(name, -1) for name in ("k", "v", "q", "eta", "alpha")),
            streams.alpha is not None,
            streams.mu is not None,
            rule.objective == "l2",
            rule.own_target,
            rule.erase,
            _READS.index(rule.read),
            rule.error_cap or 0.0,
            rule.key_eps,
            rule.eta_max,
        )


def _padded(width: int) -> int:
    return -(-width // LANES) * LANES


def _weights(rows: Tensor, rule: ChunkRule, dim: int) -> Weights:
    """View weights in rows of a state's numbers `[B, H, ...]`: what rule.h calls a `State`."""
    if rule.hidden is None:
        columns = dim * len(rule.wide) + len(rule.narrow)
        return Weights(rows.unflatten(-1, (dim, -1))[..., :columns], None, None)
    hidden, sizes = rule.hidden, (len(rule.wide), len(rule.narrow))
    parts = rows.split([dim * hidden * sum(sizes), hidden * dim * sizes[0], hidden * LANES * sizes[1]], dim=-1)
    wide, narrow = (
        part.unflatten(-1, (size, hidden, -1)) if size else None for part, size in zip(parts[1:], sizes, strict=True)
    )
    return Weights(parts[0].unflatten(-1, (dim, -1)), wide, None if narrow is None else narrow[..., :1])


def _put(rows: Tensor, weights: Weights, rule: ChunkRule, dim: int) -> None:
    for part, given in zip(_weights(rows, rule, dim), weights, strict=True):
        if part is not None:
            part.copy_(given)


def _require(done: int, c: _Rule) -> None:
    if not done:
        raise MemoryError(
            f"the system grants no memory to compute memories of width {c.dim} in chunks of {c.chunk} tokens"
        )


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: ChunkRule, num_streams: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        streams = Streams(*tensors[:num_streams])
        weights, momentum = Weights(*tensors[num_streams:][:3]), Weights(*tensors[num_streams:][3:])
        batch, heads, tokens, dim = streams.k.shape
        native, c = library(), _Rule.of(rule, streams)
        size = native.hopescale_state_size(ctypes.byref(c))
        slot = size * (2 if c.momentum else 1)
        kept = streams.k.new_empty(batch, heads, -(-tokens // rule.chunk_size), slot)
        native.hopescale_use_huge_pages(pointer(kept), ctypes.c_int64(4 * kept.numel()))
        given = kept[:, :, 0].zero_()
        _put(given[..., :size], weights, rule, dim)
        if c.momentum:
            _put(given[..., size:], momentum, rule, dim)
        last, y = kept.new_empty(batch, heads, slot), torch.empty_like(streams.q)
        seen = kept.new_empty(batch, heads, tokens, 3)
        inputs, outputs = pointers(streams), [pointer(x) for x in (kept, last, y, seen)]

        def run(begin: int, end: int) -> None:
            _require(native.hopescale_forward(ctypes.byref(c), tokens, begin, end, inputs, *outputs), c)

        share_out(run, batch * heads)
        ctx.rule, ctx.size = rule, size
        ctx.save_for_backward(*streams, kept)
        ctx.mark_non_differentiable(seen)
        ctx.set_materialize_grads(False)
        rows = [last[..., :size], last[..., size:] if c.momentum else None, kept[:, :, -1, :size]]
        after = [
            None if part is None else part.clone()
            for x in rows
            for part in (Weights(None, None, None) if x is None else _weights(x, rule, dim))
        ]
        return y, seen, *after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, _: None, *d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        rule, size = ctx.rule, ctx.size
        *streams, kept = ctx.saved_tensors
        streams = Streams(*streams)
        batch, heads, tokens, dim = streams.k.shape
        native, c = library(), _Rule.of(rule, streams)
        d_y = torch.zeros_like(streams.q) if d_y is None else d_y.contiguous()
        d_state = kept.new_zeros(batch, heads, kept.shape[-1])
        d_boundary = kept.new_zeros(batch, heads, size) if any(x is not None for x in d_after[6:]) else None
        for rows, grads in (
            (d_state[..., :size], d_after[:3]),
            (d_state[..., size:], d_after[3:6]),
            (d_boundary, d_after[6:]),
        ):
            if rows is not None and rows.shape[-1]:
                for part, grad in zip(_weights(rows, rule, dim), grads, strict=True):
                    if grad is not None:
                        part.copy_(grad)
        d_streams = tuple(None if x is None else torch.empty_like(x) for x in streams)
        inputs, gradients = pointers(streams), pointers(d_streams)
        rest = [pointer(x) for x in (kept, d_y, d_boundary, d_state)]

        def run(begin: int, end: int) -> None:
            _require(native.hopescale_backward(ctypes.byref(c), tokens, begin, end, inputs, *rest, gradients), c)

        share_out(run, batch * heads)
        d_weights = _weights(d_state[..., :size], rule, dim)
        d_momentum = _weights(d_state[..., size:], rule, dim) if c.momentum else (None, None, None)
        return None, None, *d_streams, *d_weights, *d_momentum


def self_modify_cpp(streams: Streams, running: Weights, momentum: Weights | None, rule: ChunkRule) -> ChunksOutput:
    """Run a bank of memories over a sequence. Same arguments and result as `self_modify`, on a CPU in float32."""
    inputs = Streams(*(None if x is None else x.contiguous() for x in streams))
    y, seen, *after = _Chunks.apply(rule, len(inputs), *inputs, *running, *(momentum or (None, None, None)))
    weights = [Weights(*after[n : n + 3]) for n in (0, 3, 6)]
    return ChunksOutput(y, seen, weights[0], weights[1] if momentum is not None else None, weights[2])
