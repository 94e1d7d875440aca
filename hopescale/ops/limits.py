"""Numbers that both the operations and the plans for them need. Imports no torch."""

from __future__ import annotations

BLOCK = 16
"""Number of which the widths in the C++ are multiples (`BLOCK` of `ops/cpp/matrix.h`)."""

KERNEL_DIMS = (16, 32, 64, 128)
"""Widths of heads and memories that the Triton kernels know."""

KERNEL_KEEPS = 4
"""Of so many chunks in a row the Triton kernels keep the state with which the first one starts."""

KERNEL_PIECE = 64
"""Most tokens of a piece of a chunk in the Triton kernels: the tables of longer ones leave the registers."""

KERNEL_PROGRAMS = 1024
"""Programs of a launch of these kernels, at most: each has scratch memory of its own."""

LOGITS_AT_A_TIME = 1 << 26
"""Logits that are float32 at a time where the cross-entropy goes in pieces."""

REVERSE_PARTS = 16
"""With `train.recompute: reverse`, of so many chunks in a row the state is kept with which the first one starts."""

GRAM_RATIO = 1.5
"""Ratio of the longer to the shorter side of a matrix from which `polar_express` iterates on Gram matrices: from there
on that takes fewer FLOPs."""


def is_sequential(*, adaptive: bool, linear: bool, objective: str, own_target: bool, read: str) -> bool:
    """Tell whether a chunk's writes depend on the contents of memories, so that chunks follow one another.

    Args:
        adaptive: Whether memories make any of keys, values, queries and gates.
        linear: Whether memories are linear.
        objective: Inner loss, `l2` or `dot`.
        own_target: Whether targets are a memory's own answers.
        read: State that a token reads.
    """
    return adaptive or not linear or objective != "dot" or own_target or read == "boundary"


def is_moved_by_map(tokens: int, width: int, out: int, *, momentum: bool) -> bool:
    """Tell whether a chunk moves a layer of `width` inputs by a matrix `width x width`, not by keys and values."""
    return out > width and (momentum or tokens >= width)


def is_trace_smaller(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> bool:
    """Tell whether less says how a chunk moves a layer than its weights, and their momentum, are themselves."""
    return trace_size(tokens, width, out, momentum=momentum, erase=erase) < (1 + momentum) * width * out


def trace_size(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> int:
    """Count the entries that say how a chunk moves a layer: `ChunkUpdate` and `Move` of `ops.delta_rule`."""
    if is_moved_by_map(tokens, width, out, momentum=momentum):
        return (1 + momentum) * width * (width + tokens) + tokens * out
    return (1 + (momentum and erase)) * tokens * (width + out)


def steps_on_gram(rows: int, columns: int, steps: int, *, low_precision: bool) -> int:
    """Return how many steps `polar_express` takes on one Gram matrix: 1 where the sides of a matrix are about equal.

    In low precision a Gram matrix loses what is small, and is computed anew after two steps.
    """
    if max(rows, columns) <= GRAM_RATIO * min(rows, columns):
        return 1
    return 2 if low_precision else max(1, steps)
