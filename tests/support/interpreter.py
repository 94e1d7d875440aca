"""bfloat16 in Triton's interpreter, which holds its bits as integers and multiplies matrices of those."""

from __future__ import annotations

import numpy as np
import torch


def teach_bfloat16() -> None:
    """Let the interpreter round to the nearest bfloat16, and multiply matrices of them with float32 sums."""
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

    def multiply(self, a: TensorHandle, b: TensorHandle, total: TensorHandle, *how) -> TensorHandle:
        wide = (rounded(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, total, *how)

    InterpreterBuilder.create_fp_trunc = InterpreterBuilder.create_fp_ext = rounded
    InterpreterBuilder.create_dot = multiply
