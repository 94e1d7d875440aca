"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.ops.norm import rms_norm
from hopescale.parallel.layers import ParameterSpec, new_parameter


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with one weight per entry of `shape`.

    Args:
        shape: Shape of the weight; the last entry is the normalised width. `(H, D)` gives every head its own weight.
        eps: Added under the root.
        scale: Initial weight.
        partition_dim: Dimension of the weight that is split over tensor-parallel ranks.
    """

    def __init__(self, *shape: int, eps: float, scale: float = 1.0, partition_dim: int | None = None):
        super().__init__()
        self.eps = eps
        spec = ParameterSpec(mean=scale, partition_dim=partition_dim, keep_fp32=True)
        self.weight = new_parameter(*shape, spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`."""
        return rms_norm(x, self.weight, self.eps)
