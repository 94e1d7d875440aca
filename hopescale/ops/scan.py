"""A loop over the parts of a sequence that keeps what it carries and computes everything else again when going back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

ScanStep = Callable[[int, list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor], Any]]
"""Maps the index of a part, what is carried into it and its slices of the streams to outputs, what is carried on, and
a trace for `Replay`: tensors and None in tuples and dicts of any depth."""


class Replay(NamedTuple):
    """How the backward pass finds again what was carried into parts.

    Attributes:
        follow: Maps what was carried into a part and its trace to what it handed on, at little cost.
        parts: Of so many in a row, what is carried into the first is kept, and traces for the others.
    """

    follow: Callable[[list[Tensor], Any], list[Tensor]]
    parts: int


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: ScanStep, replay: Replay | None, sizes: Sequence[int], num_streams: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        streams, carry = list(tensors[:num_streams]), list(tensors[num_streams:])
        every = 1 if replay is None else replay.parts
        # Checkpoints: of each part what is carried into it, or the trace of that before.
        checkpoints, outputs, trace = [], [], None
        for index, parts in enumerate(_parts(streams, sizes)):
            checkpoints.append(tree_map(_alone, trace) if index % every else carry)
            output, carry, trace = step(index, carry, parts)
            outputs.append(output)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.replay, ctx.sizes = step, replay, sizes
        flat, ctx.checkpoints = tree_flatten(checkpoints)
        ctx.save_for_backward(*streams, *flat)
        joined = _joined(outputs)
        ctx.num_streams, ctx.num_outputs = num_streams, len(joined)
        # What no part has replaced must not be handed out as it came in.
        input_ids = {id(tensor) for tensor in tensors}
        return (*joined, *(x.view_as(x) if id(x) in input_ids else x for x in carry))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        streams, checkpoints = saved[: ctx.num_streams], tree_unflatten(saved[ctx.num_streams :], ctx.checkpoints)
        d_outputs, d_carry = grads[: ctx.num_outputs], list(grads[ctx.num_outputs :])
        needed = ctx.needs_input_grad[4:][: ctx.num_streams]
        d_streams = [torch.zeros_like(x) if need else None for x, need in zip(streams, needed, strict=True)]
        ends = list(accumulate(ctx.sizes))
        for index, into in zip(reversed(range(len(ends))), _entered(checkpoints, ctx.replay), strict=True):
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


def _entered(checkpoints: Sequence[Any], replay: Replay | None) -> Iterator[list[Tensor]]:
    """Yield what was carried into each part, the last part first; `checkpoints` as in `forward`."""
    every = 1 if replay is None else replay.parts
    for first in reversed(range(0, len(checkpoints), every)):
        carry, *traces = checkpoints[first : first + every]
        yield from _followed(carry, traces, replay)


def _followed(carry: list[Tensor], traces: Sequence[Any], replay: Replay | None) -> Iterator[list[Tensor]]:
    """Yield what lies after each of the traces in a row, the last one first, and in the end what lies before them.

    Of `n` at most `log2(n)` are there at a time, as the second half is done before the first begins again.
    """
    if not traces:
        yield carry
        return
    half, middle = (len(traces) + 1) // 2, carry
    for trace in traces[:half]:
        middle = replay.follow(middle, trace)
    yield from _followed(middle, traces[half:], replay)
    yield from _followed(carry, traces[: half - 1], replay)


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
    streams: Sequence[Tensor],
    carry: Sequence[Tensor],
    *,
    recompute: bool,
    replay: Replay | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `step` over the parts of a sequence, one after the other.

    Args:
        step: Depends on nothing that needs a gradient but its arguments. Draws no random numbers.
        sizes: Tokens of each part.
        streams: What the parts are cut from, tokens third: `[B, H, T, ...]`.
        carry: What the first part is given; each part hands on as many tensors of the same shapes.
        recompute: Whether, of all that a part computes, only what is carried into it is kept for the backward pass.
            Gradients are those of plain automatic differentiation, up to the order of sums.
        replay: With `recompute`: how to find what is carried into most parts again; traces are kept instead.

    Returns:
        Outputs, joined along the tokens, and what the last part hands on.
    """
    if recompute and torch.is_grad_enabled():
        result = list(_Scan.apply(step, replay, sizes, len(streams), *streams, *carry))
        return result[: -len(carry)], result[-len(carry) :]
    outputs, carry = [], list(carry)
    for index, parts in enumerate(_parts(streams, sizes)):
        output, carry, _ = step(index, carry, parts)
        outputs.append(output)
    return _joined(outputs), carry
