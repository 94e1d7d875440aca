"""Comparison of the weights of data-parallel replicas, which must stay bit-equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.common.errors import DivergedError
from hopescale.parallel.mesh import Mesh

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(parameters: Mapping[str, Tensor], mesh: Mesh, step: int, shares: Mapping[str, Tensor]) -> None:
    """Compare the weights of all replicas after a step. Called by all ranks.

    `parameters` are whole on each; of `shares` ranks that have one place on their nodes hold the same.

    Raises:
        DivergedError: If any weights differ, on all ranks.
    """
    different = differing(parameters, mesh.dp_group)
    if mesh.nodes_group is not None:
        different += differing(shares, mesh.nodes_group)
    names = sorted({name for of_rank in mesh.control.gather(different) for name in of_rank})
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        hint = "a device or its memory is at fault, or ranks run different code; continue from the last checkpoint"
        raise DivergedError(f"after step {step} the replicas hold different weights: {shown}", hint)


@torch.no_grad()
def differing(parameters: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[str]:
    """Return the names of the parameters that are not bit-equal on all ranks of a group.

    A sum of the bits of each parameter is compared: one pass over the weights, eight bytes sent per parameter.
    """
    if group.size() == 1 or not parameters:
        return []
    low = torch.stack([_sum_of_bits(parameter) for parameter in parameters.values()])
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return [name for name, differs in zip(parameters, (low != high).tolist(), strict=True) if differs]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
