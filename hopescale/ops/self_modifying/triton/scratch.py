"""Where a program keeps what belongs to one piece of a chunk: rows of numbers `[C]`, tables `[C, C]`, and matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from hopescale.ops.self_modifying.triton.matrices import add, tile

RATE = tl.constexpr(0)
ALPHA = tl.constexpr(1)
MU = tl.constexpr(2)
START = tl.constexpr(3)
PUSHED = tl.constexpr(4)
"""The same two of the state that is read lie `KernelConfig.reading` behind; tables and gradients likewise."""
WROTE = tl.constexpr(7)
ERASED = tl.constexpr(8)
LINK = tl.constexpr(9)
LAST = tl.constexpr(10)
"""Weights of the first state and momentum in the last state, and of the first momentum in the last: three numbers."""
D_RATE = tl.constexpr(11)
D_FRESH = tl.constexpr(12)
D_START = tl.constexpr(13)
D_PUSHED = tl.constexpr(14)
D_WROTE = tl.constexpr(17)
D_ERASED = tl.constexpr(18)
D_LINK = tl.constexpr(19)
D_LAST = tl.constexpr(20)
D_ALPHA = tl.constexpr(21)
D_MU = tl.constexpr(22)
OVER = tl.constexpr(23)
COARSE = tl.constexpr(23)
FINE = tl.constexpr(25)
"""Of `ALPHA` and `MU`, so many rows behind: the sums of logs, in two parts."""
ROWS = tl.constexpr(28)
SHIFT = tl.constexpr(32)
"""Numbers by which it all lies further behind in every second chunk."""

KEPT = tl.constexpr(0)
WRITE = tl.constexpr(1)
SIMILAR = tl.constexpr(4)
INVERSE = tl.constexpr(5)
WEIGHTS = tl.constexpr(6)
"""Of the keys of first layers: products with one another; what erases leave, times the learning rate of the row; and
the first of them, each times the weight of the write."""
SECOND_SIMILAR = tl.constexpr(7)
D_KEPT = tl.constexpr(10)
D_WRITE = tl.constexpr(11)
ASKED = tl.constexpr(14)
"""Products of queries and keys of the layer that was read, on the way back."""
D_PRODUCTS = ASKED
"""The gradient of products of a gate, later."""
TABLES = tl.constexpr(15)

K = tl.constexpr(0)
V = tl.constexpr(1)
Q = tl.constexpr(2)
HIDDEN = tl.constexpr(3)
OF_KEY = tl.constexpr(4)
KEYS = tl.constexpr(5)
PUSH = tl.constexpr(6)
INNER = tl.constexpr(7)
SECOND = tl.constexpr(8)
FORWARD_MATRICES = tl.constexpr(9)
OF_VALUE = tl.constexpr(11)
RAW = tl.constexpr(12)
BACK = tl.constexpr(13)
D_VALUES = tl.constexpr(14)
D_HELD = tl.constexpr(15)
D_SECOND = tl.constexpr(16)
D_SECOND_HELD = tl.constexpr(17)
D_KEYS = tl.constexpr(18)
D_INNER = tl.constexpr(19)
TEMPORARY = tl.constexpr(20)
D_K = tl.constexpr(21)
D_V = tl.constexpr(22)
D_Q = tl.constexpr(23)
D_ENDS = tl.constexpr(24)
"""The gradients of the numbers at `LAST`, of each in parts, which `D_LAST` is the sums of."""
FIRST = tl.constexpr(25)
BACKWARD_MATRICES = tl.constexpr(25)
"""Without those of first layers. A layer has three in a row, from `SECOND` on or, by the number of its memory, from
`FIRST` on: what was written, what was held, both times the learning rate, and what was solved for on the way back."""
LAYER_MATRICES = tl.constexpr(3)


@triton.jit
def opaque(number, scratch):
    """Return a number, such that the compiler does not know how it follows from one turn of a loop to the next.

    It meets the two highest bits of an address, which are 0. What depends on it is computed where it is needed: masks
    and addresses that are made before a loop, or stepped along with it, would fill the registers.
    """
    return (scratch.to(tl.int64) >> 62).to(tl.int32) ^ number


@triton.jit
def again(scratch, turn):
    """Return `scratch`, or another address, such that the compiler does not know that it is the same.

    What is computed from it, address by address, is not kept from one part of a piece to the next. Parts stand in loops
    of one turn, by the number that `opaque` returns, for the same reason.
    """
    return scratch + (scratch.to(tl.int64) >> 62) * (32 * opaque(turn, scratch))


@triton.jit
def numbers(scratch, CONFIG: tl.constexpr):
    """Number the tokens of a piece."""
    return opaque(tl.arange(0, CONFIG.rows), scratch)


@triton.jit
def row(scratch, INDEX: tl.constexpr, CONFIG: tl.constexpr):
    """Point to a row of numbers, entry by entry."""
    return scratch + INDEX * CONFIG.rows + tl.arange(0, CONFIG.rows)


@triton.jit
def column(scratch, INDEX: tl.constexpr, CONFIG: tl.constexpr):
    """Load a row of numbers as factors of a matrix's rows, `[C, 1]`."""
    return tl.load(row(scratch, INDEX, CONFIG))[:, None]


@triton.jit
def table(scratch, INDEX: tl.constexpr, CONFIG: tl.constexpr):
    """Point to a table, entry by entry."""
    rows = tl.arange(0, CONFIG.rows)
    begin = ROWS * CONFIG.rows + INDEX * CONFIG.rows * CONFIG.rows
    return scratch + begin + rows[:, None] * CONFIG.rows + rows[None, :]


@triton.jit
def matrix(scratch, INDEX: tl.constexpr, CONFIG: tl.constexpr):
    """Point to the first entry of a matrix of tokens."""
    return scratch + ROWS * CONFIG.rows + TABLES * CONFIG.rows * CONFIG.rows + INDEX * CONFIG.matrix


@triton.jit
def whole(scratch, INDEX: tl.constexpr, WIDTH: tl.constexpr, CONFIG: tl.constexpr):
    """Point to a matrix of tokens `[C, WIDTH]`, entry by entry."""
    return tile(matrix(scratch, INDEX, CONFIG), CONFIG.rows, WIDTH)


@triton.jit
def add_row(scratch, INDEX: tl.constexpr, values, CONFIG: tl.constexpr):
    """Add to a row of numbers."""
    add(row(scratch, INDEX, CONFIG), values)


@triton.jit
def of_first(scratch, number, CONFIG: tl.constexpr):
    """Point to the first entry of what the first layer of a memory has written, on the way back."""
    return matrix(scratch, FIRST, CONFIG) + number * LAYER_MATRICES * CONFIG.matrix


@triton.jit
def of_layer(written, BEHIND: tl.constexpr, WIDTH: tl.constexpr, CONFIG: tl.constexpr):
    """Point to a matrix of a layer, entry by entry: 0 is what was written, 1 what was held, 2 what was solved for."""
    return tile(written + BEHIND * CONFIG.matrix, CONFIG.rows, WIDTH)
