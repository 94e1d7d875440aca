"""RMSNorm as a module."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.ops.backends import Backend
from hopescale.ops.fused import is_fused
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
        return rms_norm(x, self._scale(), self.eps)

    def _scale(self, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        weight = weight if self.shared_over is None else share_with_ranks(weight, self.shared_over)
        return weight if self.multiplier == 1 else weight * self.multiplier


class StreamNorm(RMSNorm):
    """RMSNorm of the residual stream after an addition to it; a rank holds all tokens or, sequence parallel, its share.

    Args:
        width: Width of the stream.
        mesh: Ranks of the run, and this process among them.
        backend: Code that adds and normalises.
        eps, scale, multiplier: Arguments of `RMSNorm`.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        mesh: Mesh,
        scale: float = 1.0,
        multiplier: float = 1.0,
        backend: Backend = "auto",
    ):
        shared_over = mesh if mesh.sequence_parallel else None
        super().__init__(width, eps=eps, scale=scale, multiplier=multiplier, shared_over=shared_over)
        self.backend = backend

    def forward(self, x: Tensor, added: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the stream `x + added`, or `x` where nothing is added, and its norm, `[T, B, N]` each.

        `weight` is one for each sequence, `[B, N]`, in place of the layer's own.
        """
        if weight is None and is_fused(self.backend, x):
            from hopescale.ops.fused.norm import add_rms_norm

            return add_rms_norm(x, added, self._scale(), self.eps)
        x = x if added is None else x + added
        return x, rms_norm(x, self._scale(weight), self.eps)
