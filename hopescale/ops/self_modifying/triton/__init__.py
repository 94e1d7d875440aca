"""The fused self-modifying chunks as Triton kernels; `function.py` runs them. See README.md."""
