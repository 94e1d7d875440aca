"""A rank's part of a tensor as part of the whole, for checkpoints that any other layout can read."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hopescale.parallel.layers import ParameterSpec
from hopescale.parallel.mesh import Mesh


def as_whole(part: Tensor, spec: ParameterSpec, mesh: Mesh) -> Tensor:
    """Return a tensor of the whole parameter's shape that shares memory with this rank's part.

    Args:
        part: Of the parameter itself, or of anything of its shape that belongs to it (a master, a moment).
        spec: Says how the parameter is split over tensor-parallel ranks.
        mesh: Where this process stands.
    """
    if spec.partition_dim is None or mesh.tp_group.size() == 1:
        return part
    ranks = DeviceMesh.from_group(mesh.tp_group, part.device.type)
    return DTensor.from_local(part, ranks, [Shard(spec.partition_dim)], run_check=False)
