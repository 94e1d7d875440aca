"""Products of what lies in memory, a block of rows at a time, and writes to memory that the program reads again.

A piece's matrix of tokens is `[C, width]`, rows side by side. `exists` says which of its tokens there are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(pointer, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Point to a whole matrix `[ROWS, WIDTH]`."""
    return pointer + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def entries(matrix, k, n, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Point to rows `k` and columns `n` of a matrix, whose entry `(k, n)` lies at `k * ROW + n * COLUMN`."""
    return matrix + k[:, None] * ROW + n[None, :] * COLUMN


@triton.jit
def put(pointers, values):
    """Store what other threads of the program have read before, or will read."""
    tl.debug_barrier()
    tl.store(pointers, values)
    tl.debug_barrier()


@triton.jit
def add(pointers, values):
    """Add to what was stored by `put`."""
    put(pointers, tl.load(pointers) + values)


@triton.jit
def load_rows(x, exists, WIDTH: tl.constexpr):
    """Load a piece's matrix of tokens, 0 where there is no token."""
    return tl.load(tile(x, exists.shape[0], WIDTH), mask=exists[:, None], other=0.0)


@triton.jit
def factor(x, CONFIG: tl.constexpr):
    """Round a matrix to what products multiply, before it waits for one: as bfloat16 it takes half the registers."""
    if CONFIG.precision == "bf16":
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def multiply(a, b, CONFIG: tl.constexpr, total=None):
    """Multiply two matrices in registers, in the precision of the config; the sums are float32, and go on from `total`.

    Several products with one sum take as many registers as one.
    """
    if CONFIG.precision == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        product = tl.dot(a, b, total, input_precision=CONFIG.precision)
    return product


@triton.jit
def multiply_exactly(a, b, CONFIG: tl.constexpr, total=None):
    """Multiply two matrices in registers, about as exactly as float32 where the config is not `tf32`.

    Under `bf16` each is the sum of two bfloat16 matrices, and of the four products the smallest is left out. Sums go on
    from `total`.
    """
    if CONFIG.precision == "bf16":
        high, right = a.to(tl.bfloat16), b.to(tl.bfloat16)
        product = tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), right, total)
        product = tl.dot(high, (b - right.to(tl.float32)).to(tl.bfloat16), product)
        product = tl.dot(high, right, product)
    else:
        product = tl.dot(a, b, total, input_precision=CONFIG.precision)
    return product


@triton.jit
def times(
    x,
    exists,
    matrix,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    CONFIG: tl.constexpr,
    total=None,
    weights=None,
):
    """Multiply tokens `x` `[C, K]` with a matrix `[K, N]`, whose entry `(k, n)` lies at `k * ROW + n * COLUMN`.

    Sums go on from `total`. Tokens count as much as their `weights` `[C, 1]` say.
    """
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    C: tl.constexpr = CONFIG.rows
    rows, n = tl.arange(0, C), tl.arange(0, N)
    if total is None:
        total = tl.zeros((C, N), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        left = tl.load(x + rows[:, None] * K + k[None, :], mask=exists[:, None], other=0.0)
        if weights is not None:
            left *= weights
        right = tl.load(entries(matrix, k, n, ROW, COLUMN))
        total = multiply(left, right, CONFIG, total)
    return total


@triton.jit
def ask(x, exists, matrix, LAYER: tl.constexpr, CONFIG: tl.constexpr, total=None, weights=None):
    """Multiply tokens `x` `[C, K]` with the matrix of a layer: `[C, N]`. The last two as in `times`."""
    return times(x, exists, matrix, LAYER.row, 1, LAYER.inputs, LAYER.outputs, CONFIG, total, weights)


@triton.jit
def ask_back(x, exists, matrix, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Multiply tokens `x` `[C, N]` with the matrix of a layer, transposed: `[C, K]`."""
    return times(x, exists, matrix, 1, LAYER.row, LAYER.outputs, LAYER.inputs, CONFIG)


@triton.jit
def pairs(x, y, exists, K: tl.constexpr, CONFIG: tl.constexpr, total=None):
    """Multiply tokens `x` and `y` `[C, K]` with one another: `[C, C]`. Sums go on from `total`."""
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    C: tl.constexpr = CONFIG.rows
    rows = tl.arange(0, C)
    if total is None:
        total = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        left = tl.load(x + rows[:, None] * K + k[None, :], mask=exists[:, None], other=0.0)
        right = tl.load(y + rows[None, :] * K + k[:, None], mask=exists[None, :], other=0.0)
        total = multiply(left, right, CONFIG, total)
    return total


@triton.jit
def outer(x, exists, values, k, K: tl.constexpr, CONFIG: tl.constexpr, total=None):
    """Multiply columns `k` of tokens `x` `[C, K]` with values `[C, N]`: `[k, N]`. Sums go on from `total`."""
    rows = tl.arange(0, CONFIG.rows)
    left = tl.load(x + rows[None, :] * K + k[:, None], mask=exists[None, :], other=0.0)
    return multiply(left, values, CONFIG, total)


@triton.jit
def add_outer(matrix, x, exists, values, LAYER: tl.constexpr, CONFIG: tl.constexpr):
    """Add `x^T values`, of tokens `[C, K]` and `[C, N]`, to the matrix of a layer."""
    K: tl.constexpr = LAYER.inputs
    BLOCK: tl.constexpr = CONFIG.block if CONFIG.block < K else K
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        here = entries(matrix, k, tl.arange(0, LAYER.outputs), LAYER.row, 1)
        put(here, outer(x, exists, values, k, K, CONFIG, tl.load(here)))


@triton.jit
def sigmoid(x):
    """Return the sigmoid, by a power of two and a root, which take few instructions; 0 below `x = -44`."""
    above = 1 + tl.exp2(-1.4426950408889634 * x)
    return tl.rsqrt(above * above)


@triton.jit
def slope(gate, hidden):
    """Differentiate `silu`, from `gate = sigmoid(x)` and `hidden = x gate`."""
    return gate + hidden * (1 - gate)
