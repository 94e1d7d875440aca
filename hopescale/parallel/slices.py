"""Tensors of which tensor-parallel ranks hold slices along one dimension, as wholes and back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hopescale.parallel.mesh import Mesh


def as_whole(part: Tensor, split: int | None, mesh: Mesh) -> Tensor:
    """Return a tensor of the whole's shape that shares memory with this rank's part, for any other layout to read.

    Tensor-parallel ranks hold parts along the dimension `split`, or each the whole if it is None.
    """
    if split is None or mesh.tp_group.size() == 1:
        return part
    ranks = DeviceMesh.from_group(mesh.tp_group, part.device.type)
    return DTensor.from_local(part, ranks, [Shard(split)], run_check=False)


def join_slices(part: Tensor, split: int | None, mesh: Mesh) -> Tensor:
    """Return the whole of ranks' slices, in their order of dimensions in memory. All tensor-parallel ranks call."""
    if split is None or mesh.tp_group.size() == 1:
        return part
    order = sorted(range(part.dim()), key=lambda dim: -part.stride(dim))
    laid_out = part.permute(order).contiguous()
    # Bytes, because gloo does not send every type.
    sent = laid_out.view(-1).view(torch.uint8)
    received = [torch.empty_like(sent) for _ in range(mesh.tp_group.size())]
    dist.all_gather(received, sent, group=mesh.tp_group)
    parts = [each.view(part.dtype).view(laid_out.shape) for each in received]
    return torch.cat(parts, order.index(split)).permute([order.index(dim) for dim in range(part.dim())])


def own_slice(whole: Tensor, split: int | None, mesh: Mesh) -> Tensor:
    """Return this rank's slice of a whole, in memory of its own if it is less."""
    if split is None or mesh.tp_group.size() == 1:
        return whole
    return whole.chunk(mesh.tp_group.size(), split)[mesh.tp_group.rank()].clone()
