"""Where a program keeps what belongs to one piece of a chunk: rows of numbers `[C]`, tables `[C, C]`, and matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton.matrices import add, tile

ALPHA = tl.constexpr(0)
MU = tl.constexpr(1)
D_RATE = tl.constexpr(2)
D_FRESH = tl.constexpr(3)
D_START = tl.constexpr(4)
D_PUSH = tl.constexpr(5)
READ_START = tl.constexpr(6)
READ_PUSH = tl.constexpr(7)
D_WROTE = tl.constexpr(8)
D_ERASE = tl.constexpr(9)
D_LINK = tl.constexpr(10)
D_LAST = tl.constexpr(11)
"""Gradients of the weights of the first state and momentum in the last ones: three numbers."""
ROWS = tl.constexpr(12)

D_KEPT = tl.constexpr(0)
D_WRITE = tl.constexpr(1)
READ_KEPT = tl.constexpr(2)
READ_WRITE = tl.constexpr(3)
TABLES = tl.constexpr(4)

K = tl.constexpr(0)
V = tl.constexpr(1)
Q = tl.constexpr(2)
HIDDEN = tl.constexpr(3)
KEYS = tl.constexpr(4)
PUSH = tl.constexpr(5)
INNER = tl.constexpr(6)
FORWARD_MATRICES = tl.constexpr(7)
OF_KEY = tl.constexpr(7)
OF_VALUE = tl.constexpr(8)
RAW = tl.constexpr(9)
BACK = tl.constexpr(10)
VALUES = tl.constexpr(11)
HELD = tl.constexpr(12)
SECOND = tl.constexpr(13)
SECOND_HELD = tl.constexpr(14)
D_WRITTEN = tl.constexpr(15)
D_ERASED = tl.constexpr(16)
D_SECOND = tl.constexpr(17)
D_SECOND_ERASED = tl.constexpr(18)
D_KEYS = tl.constexpr(19)
D_INNER = tl.constexpr(20)
SOLVED = tl.constexpr(21)
TEMPORARY = tl.constexpr(22)
D_K = tl.constexpr(23)
D_V = tl.constexpr(24)
D_Q = tl.constexpr(25)
BACKWARD_MATRICES = tl.constexpr(26)


@triton.jit
def row(scratch, INDEX: tl.constexpr, PLAN: tl.constexpr):
    """Point to a row of numbers, entry by entry."""
    return scratch + INDEX * PLAN.rows + tl.arange(0, PLAN.rows)


@triton.jit
def table(scratch, INDEX: tl.constexpr, PLAN: tl.constexpr):
    """Point to a table, entry by entry."""
    rows = tl.arange(0, PLAN.rows)
    begin = ROWS * PLAN.rows + INDEX * PLAN.rows * PLAN.rows
    return scratch + begin + rows[:, None] * PLAN.rows + rows[None, :]


@triton.jit
def matrix(scratch, INDEX: tl.constexpr, PLAN: tl.constexpr):
    """Point to the first entry of a matrix of tokens."""
    return scratch + ROWS * PLAN.rows + TABLES * PLAN.rows * PLAN.rows + INDEX * PLAN.matrix


@triton.jit
def whole(scratch, INDEX: tl.constexpr, WIDTH: tl.constexpr, PLAN: tl.constexpr):
    """Point to a matrix of tokens `[C, WIDTH]`, entry by entry."""
    return tile(matrix(scratch, INDEX, PLAN), PLAN.rows, WIDTH)


@triton.jit
def add_row(scratch, INDEX: tl.constexpr, values, PLAN: tl.constexpr):
    """Add to a row of numbers."""
    add(row(scratch, INDEX, PLAN), values)
