"""Layers that split over tensor-parallel ranks, on Megatron-core. Every parameter carries a `ParameterSpec`.

Residual activations are `[T, B, N]`, tokens first, as Megatron's sequence parallelism splits dimension 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from hopescale.parallel.mesh import Mesh

IGNORED_TARGET = -100


@dataclass(frozen=True)
class ParameterSpec:
    """How a parameter starts and how it is split.

    Attributes:
        std: Standard deviation of its normal initial values.
        mean: Mean of its initial values.
        identity: Whether a square matrix starts as the identity plus the above.
        partition_dim: Dimension split over tensor-parallel ranks; None if every rank holds the whole.
        keep_fp32: Whether it stays float32 in a model of lower precision (gates, norms, memories).
    """

    std: float = 0.0
    mean: float = 0.0
    identity: bool = False
    partition_dim: int | None = None
    keep_fp32: bool = False


def attach(parameter: nn.Parameter, spec: ParameterSpec) -> nn.Parameter:
    """Attach a spec and the attributes Megatron looks for; returns the parameter."""
    parameter.spec = spec
    split = spec.partition_dim is not None
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, split, spec.partition_dim if split else -1, 1)
    return parameter


def new_parameter(*shape: int, spec: ParameterSpec) -> nn.Parameter:
    """Allocate a float32 parameter of the local shape; `models.init` fills it."""
    return attach(nn.Parameter(torch.empty(*shape)), spec)


@cache
def _megatron_config() -> ModelParallelConfig:
    return ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)


def _never_called(weight: Tensor) -> None:
    raise AssertionError("parameters are initialised by models.init")


class ColumnLinear(ColumnParallelLinear):
    """`y = x W^T` with the outputs split over ranks; input whole, output `[..., out / tp]`. No bias."""

    def __init__(self, size_in: int, size_out: int, *, std: float, mesh: Mesh, reduce_input_grad: bool = True):
        super().__init__(
            size_in,
            size_out,
            config=_megatron_config(),
            init_method=_never_called,
            bias=False,
            tp_group=mesh.tp_group,
            disable_grad_reduce=not reduce_input_grad,
        )
        attach(self.weight, ParameterSpec(std=std, partition_dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to this rank's `[..., out / tp]`."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """`y = x W^T` with the inputs split over ranks; input `[..., in / tp]`, output whole. No bias."""

    def __init__(self, size_in: int, size_out: int, *, std: float, mesh: Mesh):
        super().__init__(
            size_in,
            size_out,
            config=_megatron_config(),
            init_method=_never_called,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tp_group,
        )
        attach(self.weight, ParameterSpec(std=std, partition_dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's `[..., in / tp]` to the sum over ranks, `[..., out]`."""
        return super().forward(x)[0]

    def partial(self, x: Tensor) -> Tensor:
        """Map to this rank's share of the sum only; `reduce_from_ranks` completes it."""
        return F.linear(x, self.weight)


class Embedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary split over ranks."""

    def __init__(self, entries: int, size: int, *, std: float, mesh: Mesh):
        super().__init__(entries, size, init_method=_never_called, config=_megatron_config(), tp_group=mesh.tp_group)
        attach(self.weight, ParameterSpec(std=std, partition_dim=0))


def share_with_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Return `x`, its gradient summed over tensor-parallel ranks: before several `reduce_input_grad=False` layers."""
    return copy_to_tensor_model_parallel_region(x, group=mesh.tp_group)


def reduce_from_ranks(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum `x` over tensor-parallel ranks; its gradient passes unchanged."""
    return reduce_from_tensor_model_parallel_region(x, group=mesh.tp_group)


def cross_entropy_sum(logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
    """Sum the cross-entropy in nats over all targets that are not `IGNORED_TARGET`.

    Args:
        logits: This rank's share `[..., V / tp]`, any type; computed in float32.
        targets: Indices into the whole vocabulary `[...]`, int64.
        mesh: Ranks that share the vocabulary.
    """
    flat, targets = logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if mesh.tp_group.size() == 1:
        return F.cross_entropy(flat, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    counted = targets != IGNORED_TARGET
    # Megatron's kernel overwrites float32 logits.
    losses = vocab_parallel_cross_entropy(flat.clone(), targets.masked_fill(~counted, 0))
    return (losses * counted).sum()
