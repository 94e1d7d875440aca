"""Parameters without memory of their own: the tensor that they become a part of brings it, and takes their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Draw = Callable[[range], Tensor]
"""Function that returns the initial values of entries of a flattened parameter."""


def defer(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device, draw: Draw | None) -> None:
    """Take a parameter's memory away until `move_into`.

    Args:
        parameter: Parameter, whose values are lost.
        dtype, device: Type and device that it has from here on.
        draw: Function that returns its initial values; None if a checkpoint will set them.
    """
    bare = torch.empty(parameter.shape, dtype=dtype, device=device)
    bare.untyped_storage().resize_(0)
    parameter.data = bare
    parameter.draw = draw


def is_deferred(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has no memory yet."""
    return hasattr(parameter, "draw")


def copy_values(parameter: nn.Parameter, into: Tensor, drawn: range | None = None) -> None:
    """Copy a parameter's values; of one without memory draw them, or leave what is there to a checkpoint.

    `into` is contiguous. `drawn` are the entries to draw; None draws all.
    """
    if not is_deferred(parameter):
        into.copy_(parameter.detach())
    elif parameter.draw is not None:
        entries = range(into.numel()) if drawn is None else drawn
        into.view(-1)[entries.start : entries.stop].copy_(parameter.draw(entries))


def move_into(parameter: nn.Parameter, view: Tensor, drawn: range | None = None) -> None:
    """Make a view the memory of a parameter, with its values: `copy_values`."""
    copy_values(parameter, view, drawn)
    parameter.data = view
    if is_deferred(parameter):
        del parameter.draw


@contextmanager
def zeros_lent(module: nn.Module) -> Iterator[None]:
    """Lend zeros to the parameters of a module that have no memory."""
    deferred = [parameter for parameter in module.parameters() if is_deferred(parameter)]
    try:
        for parameter in deferred:
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
            parameter.detach().zero_()
        yield
    finally:
        for parameter in deferred:
            parameter.untyped_storage().resize_(0)
