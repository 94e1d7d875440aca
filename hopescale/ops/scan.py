"""A loop over the parts of a sequence that keeps what it carries and computes everything else again when going back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int, list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""Maps the index of a part, what is carried into it and its slices of the streams to outputs and what is carried on."""


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, sizes: Sequence[int], num_streams: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        streams, carried = list(tensors[:num_streams]), list(tensors[num_streams:])
        kept, outputs = [], []
        for index, parts in enumerate(_parts(streams, sizes)):
            kept.append(carried)
            output, carried = step(index, carried, parts)
            outputs.append(output)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.sizes = step, sizes
        ctx.save_for_backward(*streams, *(tensor for part in kept for tensor in part))
        joined = _joined(outputs)
        ctx.num_streams, ctx.num_outputs = num_streams, len(joined)
        # What no part has replaced must not be handed out as it came in.
        given = {id(tensor) for tensor in tensors}
        return (*joined, *(x.view_as(x) if id(x) in given else x for x in carried))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        streams, kept = saved[: ctx.num_streams], saved[ctx.num_streams :]
        d_outputs, d_carried = grads[: ctx.num_outputs], list(grads[ctx.num_outputs :])
        needed = ctx.needs_input_grad[3:][: ctx.num_streams]
        d_streams = [torch.zeros_like(x) if need else None for x, need in zip(streams, needed, strict=True)]
        ends = list(accumulate(ctx.sizes))
        for index in reversed(range(len(ends))):
            here = slice(ends[index] - ctx.sizes[index], ends[index])
            into = kept[index * len(d_carried) :][: len(d_carried)]
            carried = [x.detach().requires_grad_() for x in into]
            parts = [x[:, :, here].detach().requires_grad_(need) for x, need in zip(streams, needed, strict=True)]
            with torch.enable_grad():
                outputs, after = ctx.step(index, carried, parts)
            d_here = [None if grad is None else grad[:, :, here] for grad in d_outputs]
            known = [
                (x, grad)
                for x, grad in zip((*outputs, *after), (*d_here, *d_carried), strict=True)
                if grad is not None and x.requires_grad
            ]
            asked = [x for x in (*parts, *carried) if x.requires_grad]
            results, d_results = zip(*known, strict=True)
            found = torch.autograd.grad(results, asked, d_results, allow_unused=True)
            d_carried = list(found[len(asked) - len(carried) :])
            for whole, grad in zip((x for x in d_streams if x is not None), found, strict=False):
                if grad is not None:
                    whole[:, :, here] = grad
        return (None, None, None, *d_streams, *d_carried)


def _parts(streams: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    return [list(parts) for parts in zip(*(x.split(sizes, dim=2) for x in streams), strict=True)]


def _joined(outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)]


def scan(
    step: Step, sizes: Sequence[int], streams: Sequence[Tensor], carried: Sequence[Tensor], *, recompute: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `step` over the parts of a sequence, one after the other.

    Args:
        step: Depends on nothing that needs a gradient but its arguments. Draws no random numbers.
        sizes: Tokens of each part.
        streams: What the parts are cut from, tokens third: `[B, H, T, ...]`.
        carried: What the first part is given; each part hands on as many tensors of the same shapes.
        recompute: Whether, of all that a part computes, only what is carried into it is kept for the backward pass.
            Gradients are those of plain automatic differentiation, up to the order of sums.

    Returns:
        Outputs, joined along the tokens, and what the last part hands on.
    """
    if recompute and torch.is_grad_enabled():
        result = list(_Scan.apply(step, sizes, len(streams), *streams, *carried))
        return result[: -len(carried)], result[-len(carried) :]
    outputs, carried = [], list(carried)
    for index, parts in enumerate(_parts(streams, sizes)):
        output, carried = step(index, carried, parts)
        outputs.append(output)
    return _joined(outputs), carried
