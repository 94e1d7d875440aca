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
    """Return `x`, its gradient summed over tensor-parallel ranks: each holds `x` whole and uses a part."""
    if mesh.tp_group.size() == 1:
        return x
    shared = copy_to_tensor_model_parallel_region(x, group=mesh.tp_group)
    if shared.requires_grad:
        # Megatron drops the sum of a gradient that is not contiguous.
        shared.register_hook(Tensor.contiguous)
    return shared


def gather_tokens(x: Tensor, mesh: Mesh) -> Tensor:
    """Return all tokens `[T, B, N]`, the gradient summed over ranks: before `shared_input` layers.

    Under sequence parallelism `x` is this rank's `[T / tp, B, N]`.
    """
    if mesh.sequence_parallel:
        return gather_from_sequence_parallel_region(x, group=mesh.tp_group)
    return share_with_ranks(x, mesh)


def gather_columns(x: Tensor, mesh: Mesh) -> Tensor:
    """Return the whole `[..., C]` of ranks' slices `[..., c]`, such as the inputs of a `RowLinear`."""
    return gather_from_tensor_model_parallel_region(x, group=mesh.tp_group)


def reduce_from_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum over tensor-parallel ranks, back into the residual stream: undoes `gather_tokens` after `partial` layers.

    `x` `[T, B, N]` is overwritten. Under sequence parallelism this rank's `[T / tp, B, N]` is returned.
    """
    if mesh.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(x, group=mesh.tp_group)
    if mesh.tp_group.size() == 1:
        return x
    return reduce_from_tensor_model_parallel_region(x.contiguous(), group=mesh.tp_group)


def sum_over_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum over tensor-parallel ranks what each of them goes on with: the gradient is summed over them, too."""
    if mesh.tp_group.size() == 1:
        return x
    return share_with_ranks(reduce_from_tensor_model_parallel_region(x.contiguous(), group=mesh.tp_group), mesh)
