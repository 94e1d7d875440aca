"""Numbers that both the operations and whoever plans for them must know. Imports no torch."""

from __future__ import annotations

FUSED_MULTIPLE = 16
"""Heads and memories of such widths can be run by `train.backend: cpp`."""

REVERSE_PARTS = 16
"""With `train.recompute: reverse`, of so many chunks in a row the state is kept with which the first one starts."""


def is_moved_by_map(tokens: int, width: int, out: int, *, momentum: bool) -> bool:
    """Tell whether a chunk moves a layer of `width` inputs by a matrix `width x width`, not by keys and values."""
    return out > width and (momentum or tokens >= width)


def is_trace_smaller(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> bool:
    """Tell whether less says how a chunk moves a layer than its weights, and their momentum, are themselves."""
    return trace_size(tokens, width, out, momentum=momentum, erase=erase) < (1 + momentum) * width * out


def trace_size(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> int:
    """Count the entries that say how a chunk moves a layer: `Entry` and `Move` of `ops.delta_rule`."""
    if is_moved_by_map(tokens, width, out, momentum=momentum):
        return (1 + momentum) * width * (width + tokens) + tokens * out
    return (1 + (momentum and erase)) * tokens * (width + out)
