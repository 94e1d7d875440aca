"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.ops.norm import rms_norm
from hopescale.parallel.layers import ParameterSpec, new_parameter, share_with_ranks
from hopescale.parallel.mesh import Mesh


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with one weight per entry of `shape`.

    Args:
        shape: Shape of the weight; the last entry is the normalised width. `(H, D)` gives every head its own weight.
        eps: Added under the root.
        scale: Initial weight.
        partition_dim: Dimension of the weight that is split over tensor-parallel ranks.
        shared_over: Given if the weight is whole on every rank but applied to that rank's heads alone: its gradient is
            then summed over the ranks of this mesh.
    """

    def __init__(
        self,
        *shape: int,
        eps: float,
        scale: float = 1.0,
        partition_dim: int | None = None,
        shared_over: Mesh | None = None,
    ):
        super().__init__()
        self.eps, self.shared_over = eps, shared_over
        spec = ParameterSpec(mean=scale, partition_dim=partition_dim, keep_fp32=True)
        self.weight = new_parameter(*shape, spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`."""
        weight = self.weight if self.shared_over is None else share_with_ranks(self.weight, self.shared_over)
        return rms_norm(x, weight, self.eps)
