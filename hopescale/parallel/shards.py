"""A rank's part of a tensor as part of the whole, for checkpoints that any other layout can read."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hopescale.parallel.mesh import Mesh


def as_whole(part: Tensor, split: int | None, mesh: Mesh) -> Tensor:
    """Return a tensor of the whole's shape that shares memory with this rank's part.

    Args:
        part: Of a parameter, or of anything that belongs to one (a master, a moment, a Gram matrix).
        split: Dimension along which tensor-parallel ranks hold parts; None if each holds the whole.
        mesh: Where this process stands.
    """
    if split is None or mesh.tp_group.size() == 1:
        return part
    ranks = DeviceMesh.from_group(mesh.tp_group, part.device.type)
    return DTensor.from_local(part, ranks, [Shard(split)], run_check=False)
