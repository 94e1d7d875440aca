"""Where a program keeps what belongs to one piece of a chunk: rows of numbers `[C]`, tables `[C, C]`, matrices of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

ROWS = tl.constexpr(12)
ETA = tl.constexpr(0)
ALPHA = tl.constexpr(1)
MU = tl.constexpr(2)

TABLES = tl.constexpr(4)

FORWARD_MATRICES = tl.constexpr(7)
K = tl.constexpr(0)
V = tl.constexpr(1)
Q = tl.constexpr(2)
HIDDEN = tl.constexpr(3)
KEYS = tl.constexpr(4)
PUSH = tl.constexpr(5)
INNER = tl.constexpr(6)

BACKWARD_MATRICES = tl.constexpr(24)
OF_VALUE = tl.constexpr(7)
RAW = tl.constexpr(8)
BACK = tl.constexpr(9)


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
