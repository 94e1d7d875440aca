"""Gram matrices of the inputs of linear layers, accumulated in backward passes as gradients are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hopescale.parallel.layers import ColumnLinear, RowLinear
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_columns, gather_tokens

Gather = Callable[[Tensor], Tensor]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a model by the name of their weight."""
    kinds = (nn.Linear, ColumnLinear, RowLinear)
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def accumulate_gram(
    layer: nn.Module, count: int, *, all_tokens: Gather | None = None, all_columns: Gather | None = None
) -> RemovableHandle:
    """Let backward passes through a linear layer add up the Gram matrix of its inputs.

    `weight.gram` is to the inputs `x` what `weight.grad` is to the loss: missing or None at first, then each backward
    pass adds its sum of `x x^T / count`, in float32, until the tensor is set to zero or to None. An input counts once,
    also where activations are computed again, and not at all in a pass without gradients.

    Args:
        layer: Layer with a `weight` `[R, c]`, whose first positional argument is the input `[..., c]`.
        count: Inputs that the loss is a mean over; of all micro batches and ranks.
        all_tokens: Function that makes the tokens whole where ranks hold parts of them. Like the next it is called in
            each backward pass, by all of these ranks.
        all_columns: Function that makes the columns whole, `[..., C]`, where ranks hold slices of them. The Gram matrix
            is then this rank's columns of the whole, `[C, c]`; without it, that of the slice, `[c, c]`.

    Returns:
        What removes the hook.
    """

    def add(x: Tensor) -> None:
        x = x if all_tokens is None else all_tokens(x)
        whole = None if all_columns is None else all_columns(x).flatten(0, -2).float()
        x = x.flatten(0, -2).float()
        whole = x if whole is None else whole
        if getattr(layer.weight, "gram", None) is None:
            layer.weight.gram = x.new_zeros(whole.shape[-1], x.shape[-1])
        layer.weight.gram.addmm_(whole.mT, x, alpha=1 / count)

    def see(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        x = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
        return _AtBackward.apply(x, add), *inputs[1:]

    return layer.register_forward_pre_hook(see)


class _AtBackward(torch.autograd.Function):
    """The identity; hands over its input when the gradient comes by.

    What is saved here is saved by the layer anyway, and where activations are computed again so is this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        ctx.take(*ctx.saved_tensors)
        return slope, None


def gather_grams(
    layers: Mapping[str, nn.Module], names: Iterable[str], count: int, *, whole_matrices: bool, mesh: Mesh
) -> None:
    """Let layers of a model, some maybe split over tensor-parallel ranks, accumulate Gram matrices. Called by all
    ranks.

    A layer whose outputs are split has the whole inputs, and so the Gram matrix of the whole. One whose inputs are
    split has that of its slice, or with `whole_matrices` its columns of the whole.

    Args:
        layers: Layers that `linear_layers` returns.
        names: Names of those to be looked at, and maybe of layers of other ranks.
        count: Tokens of a step.
        whole_matrices: Whether a slice of inputs needs the others.
        mesh: Ranks of this process.
    """
    for name in names:
        layer, gathers = layers.get(name), {}
        if isinstance(layer, ColumnLinear) and layer.sequence_parallel:
            gathers["all_tokens"] = partial(gather_tokens, mesh=mesh)
        elif isinstance(layer, RowLinear) and whole_matrices and mesh.tp_group.size() > 1:
            gathers["all_columns"] = partial(gather_columns, mesh=mesh)
        if layer is not None:
            accumulate_gram(layer, count, **gathers)
