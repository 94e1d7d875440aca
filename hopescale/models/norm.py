"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.ops.norm import rms_norm
from hopescale.parallel.layers import ParameterSpec, new_parameter
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import share_with_ranks


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with one weight per entry of `shape`.

    Args:
        shape: Shape of the weight; the last entry is the normalised width. `(H, D)` gives every head its own weight.
        eps: Added under the root.
        scale: Initial weight.
        partition_dim: Dimension of the weight that is split over tensor-parallel ranks.
        multiplier: Constant factor on the output.
        shared_over: Given if the weight is whole on every rank but applied to that rank's heads or tokens alone: its
            gradient is then summed over the tensor-parallel ranks of this mesh.
    """

    def __init__(
        self,
        *shape: int,
        eps: float,
        scale: float = 1.0,
        multiplier: float = 1.0,
        partition_dim: int | None = None,
        shared_over: Mesh | None = None,
    ):
        super().__init__()
        self.eps, self.multiplier, self.shared_over = eps, multiplier, shared_over
        spec = ParameterSpec(mean=scale, partition_dim=partition_dim, keep_fp32=True)
        self.weight = new_parameter(*shape, spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`."""
        weight = self.weight if self.shared_over is None else share_with_ranks(self.weight, self.shared_over)
        weight = weight if self.multiplier == 1 else weight * self.multiplier
        return rms_norm(x, weight, self.eps)


def stream_norm(width: int, *, eps: float, mesh: Mesh, scale: float = 1.0, multiplier: float = 1.0) -> RMSNorm:
    """Make an RMSNorm of the residual stream, of which a rank holds all tokens or, sequence parallel, its share."""
    shared_over = mesh if mesh.sequence_parallel else None
    return RMSNorm(width, eps=eps, scale=scale, multiplier=multiplier, shared_over=shared_over)
