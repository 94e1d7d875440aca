"""Products of bfloat16 and TF32 in Triton's interpreter, as tensor cores take them.

The interpreter holds the bits of bfloat16 as integers, and multiplies matrices of those. It takes float32 for TF32,
which has 10 of its 23 bits behind the point. Triton hands float32 operands of a `tf32` product to the tensor cores as
they are, and these do not read the last 13 bits: they cut and do not round. For `tf32x3` Triton's code rounds each
operand to the nearest TF32, away from 0 in the middle (`cvt.rna`), and takes what is left over, of which the tensor
cores cut the end, times the other's rounded part.
"""

from __future__ import annotations

import numpy as np
import torch

CUT = np.uint32(0xFFFFE000)
"""Bits of a float32 that TF32 has."""


def cut(x: np.ndarray) -> np.ndarray:
    """Leave out the bits of a float32 that TF32 lacks."""
    return (np.ascontiguousarray(x).view(np.uint32) & CUT).view(np.float32)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest TF32, away from 0 in the middle."""
    return cut((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)).view(np.float32))


def teach_tensor_cores() -> None:
    """Let the interpreter round to bfloat16, and multiply matrices as tensor cores do, with float32 sums."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, source: TensorHandle, kind) -> TensorHandle:
        before, after = source.dtype.scalar, kind.scalar
        if (before, after) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), after)
        if (before, after) == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), after)
        return cast(self, source, kind)

    def multiply(self, a: TensorHandle, b: TensorHandle, total: TensorHandle, precision, *how) -> TensorHandle:
        if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            pairs = [tuple(rounded(self, x, tl.float32).data for x in (a, b))]
        elif precision.name == "IEEE":
            pairs = [(a.data, b.data)]
        else:
            pairs = [(cut(a.data), cut(b.data))]
        if precision.name == "TF32x3":
            high = rounded_to_tf32(a.data), rounded_to_tf32(b.data)
            low = [cut(x.data - part) for x, part in zip((a, b), high, strict=True)]
            pairs = [(low[0], high[1]), (high[0], low[1]), high]
        for left, right in pairs:
            operands = TensorHandle(left, tl.float32), TensorHandle(right, tl.float32)
            total = dot(self, *operands, total, precision, *how)
        return total

    InterpreterBuilder.create_fp_trunc = InterpreterBuilder.create_fp_ext = rounded
    InterpreterBuilder.create_dot = multiply
