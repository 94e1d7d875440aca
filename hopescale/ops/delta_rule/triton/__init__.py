"""The delta rule as Triton kernels. Importing this imports Triton; `backend.py` decides whether to. See README.md."""

from hopescale.ops.delta_rule.triton.function import delta_rule_triton

__all__ = ["delta_rule_triton"]
