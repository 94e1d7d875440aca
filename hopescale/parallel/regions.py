"""Where tensors enter and leave the part of a model that is split over tensor-parallel ranks, forward and backward."""

from __future__ import annotations

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from hopescale.parallel.mesh import Mesh


def share_with_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Return `x`, its gradient summed over tensor-parallel ranks: for what all of them hold and each uses in part."""
    shared = copy_to_tensor_model_parallel_region(x, group=mesh.tp_group)
    if shared.requires_grad and mesh.tp_group.size() > 1:
        # Megatron drops the sum of a gradient that is not contiguous.
        shared.register_hook(Tensor.contiguous)
    return shared


def gather_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """Return all tokens of the residual stream, the gradient summed over ranks: before `shared_input` layers.

    Args:
        x: `[T, B, N]`, or this rank's `[T / tp, B, N]` under sequence parallelism.
        mesh: Ranks that hold the layers.

    Returns:
        `[T, B, N]`.
    """
    if mesh.sequence_parallel:
        return gather_from_sequence_parallel_region(x, group=mesh.tp_group)
    return share_with_ranks(x, mesh)


def gather_columns(x: Tensor, mesh: Mesh) -> Tensor:
    """Return what tensor-parallel ranks hold slices of along the last dimension, as the inputs of a `RowLinear`.

    Args:
        x: `[..., c]`.
        mesh: Ranks that hold the slices.

    Returns:
        `[..., C]`, in the order of the ranks.
    """
    return gather_from_tensor_model_parallel_region(x, group=mesh.tp_group)


def reduce_from_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum over tensor-parallel ranks, back into the residual stream: undoes `gather_tokens` after `partial` layers.

    Args:
        x: This rank's share of the sum, `[T, B, N]`. Overwritten.
        mesh: Ranks that hold the layers.

    Returns:
        `[T, B, N]`, or this rank's `[T / tp, B, N]` under sequence parallelism.
    """
    if mesh.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x, group=mesh.tp_group)
    return reduce_from_tensor_model_parallel_region(x.contiguous(), group=mesh.tp_group)
