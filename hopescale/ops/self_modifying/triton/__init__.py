"""The fused self-modifying chunks as Triton kernels. Importing this imports Triton. See README.md."""

from hopescale.ops.self_modifying.triton.function import self_modifying_triton

__all__ = ["self_modifying_triton"]
