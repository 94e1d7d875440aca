"""A loop over the parts of a sequence that keeps its carry and computes everything else again when going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

Streams = TypeVar("Streams")
Carry = TypeVar("Carry")
"""Trees: tensors and None in tuples and dicts of any depth, of one shape throughout."""

ScanStep = Callable[[int, Carry, Streams], tuple[Sequence[Tensor], Carry, Any]]
"""Maps the index of a part, the carry into it and its slices of the streams to outputs, the carry out of it, and a
trace for `Replay`, which is a tree of any shape."""


class Replay(NamedTuple):
    """How the backward pass computes the carry into parts again.

    Attributes:
        follow: Function of the carry into a part and its trace that returns the carry out of it, at little cost.
        parts: Number of parts in a row of which the carry into the first is kept, and traces for the others.
    """

    follow: Callable[[Any, Any], Any]
    parts: int


class _Shape(NamedTuple):
    """The shape of a tree, without its tensors."""

    spec: TreeSpec
    present: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> _Shape:
        leaves, spec = tree_flatten(tree)
        return cls(spec, tuple(x is not None for x in leaves))

    def build(self, tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if one else None for one in self.present], self.spec)


def _flat(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if x is not None]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: ScanStep, replay: Replay | None, sizes: Sequence[int], num_streams: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        streams, carry = list(tensors[:num_streams]), list(tensors[num_streams:])
        every = 1 if replay is None else replay.parts
        kept, outputs, trace = [], [], None  # of each part the carry into it, or the trace of the part before
        for index, parts in enumerate(_parts(streams, sizes)):
            kept.append(tree_map(_alone, trace) if index % every else carry)
            output, carry, trace = step(index, carry, parts)
            outputs.append(output)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.replay, ctx.sizes = step, replay, sizes
        flat, ctx.kept = tree_flatten(kept)
        ctx.save_for_backward(*streams, *flat)
        joined = _joined(outputs)
        ctx.num_streams, ctx.num_outputs = num_streams, len(joined)
        # A tensor that no part has replaced must not be handed out as it came in.
        inputs = {id(tensor) for tensor in tensors}
        return (*joined, *(x.view_as(x) if id(x) in inputs else x for x in carry))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        streams, kept = saved[: ctx.num_streams], tree_unflatten(saved[ctx.num_streams :], ctx.kept)
        d_outputs, d_carry = grads[: ctx.num_outputs], list(grads[ctx.num_outputs :])
        needed = ctx.needs_input_grad[4:][: ctx.num_streams]
        d_streams = [torch.zeros_like(x) if need else None for x, need in zip(streams, needed, strict=True)]
        ends = list(accumulate(ctx.sizes))
        for index, into in zip(reversed(range(len(ends))), _carries(kept, ctx.replay), strict=True):
            here = slice(ends[index] - ctx.sizes[index], ends[index])
            carry = [x.detach().requires_grad_() for x in into]
            parts = [x[:, :, here].detach().requires_grad_(need) for x, need in zip(streams, needed, strict=True)]
            with torch.enable_grad():
                outputs, after, _ = ctx.step(index, carry, parts)
            d_here = [None if grad is None else grad[:, :, here] for grad in d_outputs]
            pairs = [
                (x, grad)
                for x, grad in zip((*outputs, *after), (*d_here, *d_carry), strict=True)
                if grad is not None and x.requires_grad
            ]
            sources = [x for x in (*parts, *carry) if x.requires_grad]
            results, d_results = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(results, sources, d_results, allow_unused=True)
            d_carry = list(gradients[len(sources) - len(carry) :])
            for whole, grad in zip((x for x in d_streams if x is not None), gradients, strict=False):
                if grad is not None:
                    whole[:, :, here] = grad
        return (None, None, None, None, *d_streams, *d_carry)


def _carries(kept: Sequence[Any], replay: Replay | None) -> Iterator[list[Tensor]]:
    """Yield the carry into each part, the last part first; `kept` as in `forward`."""
    every = 1 if replay is None else replay.parts
    for first in reversed(range(0, len(kept), every)):
        carry, *traces = kept[first : first + every]
        yield from _follow(carry, traces, replay)


def _follow(carry: list[Tensor], traces: Sequence[Any], replay: Replay | None) -> Iterator[list[Tensor]]:
    """Yield the carry after each of the traces in a row, the last one first, and in the end the carry before them.

    Of `n` at most `log2(n)` are there at a time, as the second half is done before the first begins again.
    """
    if not traces:
        yield carry
        return
    half, middle = (len(traces) + 1) // 2, carry
    for trace in traces[:half]:
        middle = replay.follow(middle, trace)
    yield from _follow(middle, traces[half:], replay)
    yield from _follow(carry, traces[: half - 1], replay)


def _alone(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor that keeps no more than itself in memory."""
    return tensor.clone() if tensor is not None and tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _parts(streams: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    return [list(parts) for parts in zip(*(x.split(sizes, dim=2) for x in streams), strict=True)]


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)]


def scan(
    step: ScanStep,
    sizes: Sequence[int],
    streams: Streams,
    carry: Carry,
    *,
    recompute: bool,
    replay: Replay | None = None,
) -> tuple[list[Tensor], Carry]:
    """Run `step` over the parts of a sequence, one after the other.

    Args:
        step: Function that depends on nothing that needs a gradient but its arguments, and draws no random numbers.
        sizes: Tokens of each part.
        streams: Tree of tensors that are cut into parts, tokens third: `[B, H, T, ...]`.
        carry: Tree that the first part is given; each part hands on one of the same shape.
        recompute: Whether, of all that a part computes, only the carry into it is kept for the backward pass.
            Gradients are those of plain automatic differentiation, up to the order of sums.
        replay: Way to compute the carry into most parts again, with `recompute`; traces are kept instead.

    Returns:
        Outputs, joined along the tokens, and the carry out of the last part.
    """
    # What follows lasts as long as the graph, so it holds shapes and no tensors.
    cut, shape = _Shape.of(streams), _Shape.of(carry)

    def flat_step(index: int, into: list[Tensor], parts: list[Tensor]) -> tuple[Sequence[Tensor], list[Tensor], Any]:
        outputs, after, trace = step(index, shape.build(into), cut.build(parts))
        return outputs, _flat(after), trace

    def follow(into: list[Tensor], trace: Any) -> list[Tensor]:
        return _flat(replay.follow(shape.build(into), trace))

    streams, carry = _flat(streams), _flat(carry)
    if recompute and torch.is_grad_enabled():
        flat_replay = None if replay is None else Replay(follow, replay.parts)
        result = list(_Scan.apply(flat_step, flat_replay, sizes, len(streams), *streams, *carry))
        return result[: -len(carry)], shape.build(result[-len(carry) :])
    outputs = []
    for index, parts in enumerate(_parts(streams, sizes)):
        output, carry, _ = flat_step(index, carry, parts)
        outputs.append(output)
    return _joined(outputs), shape.build(carry)
