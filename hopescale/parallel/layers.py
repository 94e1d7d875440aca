"""Layers that split over tensor-parallel ranks, on Megatron-core. Every parameter carries a `ParameterSpec`.

Residual activations are `[T, B, N]`, tokens first, as Megatron's sequence parallelism splits dimension 0: under it a
rank holds `[T / tp, B, N]`, and a layer gathers the tokens on its way in and shares them out again on its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from hopescale.config.transfer import Size
from hopescale.ops.cross_entropy import VocabularyShare, cross_entropy_in_pieces
from hopescale.ops.vectors import linear
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
        of_uniform: Function from numbers drawn evenly from (0, 1), float64, to its initial values, entry by entry; None
            for a parameter that starts as the above.
        sizes: Kinds of the rows and columns of a linear map, or of the entries of a vector that inputs are multiplied
            with; empty where each entry acts alone. They decide how its learning rate follows the width.
        parts: Projections that a matrix fuses: of the rows of each head, or group of heads, one after the other the
            number of heads' slices that make one projection and the width of each. Empty if it is one projection.
    """

    std: float = 0.0
    mean: float = 0.0
    identity: bool = False
    partition_dim: int | None = None
    keep_fp32: bool = False
    of_uniform: Callable[[Tensor], Tensor] | None = None
    sizes: tuple[Size, ...] = ()
    parts: tuple[tuple[int, int], ...] = ()

    def whole_shape(self, shape: Sequence[int], tp: int) -> tuple[int, ...]:
        """Return the shape over all of `tp` tensor-parallel ranks of a parameter that has `shape` on each."""
        return tuple(size * tp if dim == self.partition_dim else size for dim, size in enumerate(shape))


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
def _megatron_config(tp: int, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


def _is_plain(tp_group: dist.ProcessGroup) -> bool:
    """Tell whether a layer is only its product, which costs a token less than the calls around it."""
    return tp_group.size() == 1 and not torch.is_grad_enabled()


def _never_called(weight: Tensor) -> None:
    raise AssertionError("parameters are initialised by models.init")


class ColumnLinear(ColumnParallelLinear):
    """`y = x W^T + b` with the outputs split over ranks; input whole, output `[..., out / tp]`.

    Args:
        size_in: Width of the input.
        size_out: Width of the output over all ranks.
        std: Standard deviation of the initial weights.
        mesh: Ranks that hold the layer.
        shared_input: Whether the input comes from `gather_tokens`, which communicates once for all layers it feeds.
        bias: Whether there is a bias, which starts at 0.
        sizes, parts: Kinds of the weight's rows and columns, and projections that it fuses, for its `ParameterSpec`.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        std: float,
        mesh: Mesh,
        shared_input: bool = False,
        bias: bool = False,
        sizes: tuple[Size, ...] = ("width", "width"),
        parts: tuple[tuple[int, int], ...] = (),
    ):
        super().__init__(
            size_in,
            size_out,
            config=_megatron_config(mesh.tp_group.size(), mesh.sequence_parallel and not shared_input),
            init_method=_never_called,
            bias=bias,
            tp_group=mesh.tp_group,
            disable_grad_reduce=shared_input,
        )
        attach(self.weight, ParameterSpec(std=std, partition_dim=0, sizes=sizes, parts=parts))
        if bias:
            attach(self.bias, ParameterSpec(partition_dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Map residual activations, or all tokens if `shared_input`, to this rank's `[T, B, out / tp]`."""
        if _is_plain(self.tp_group):
            y = linear(x, self.weight)
            return y if self.bias is None else y + self.bias  # rounds as Megatron's does
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """`y = x W^T` with the inputs split over ranks; input `[T, B, in / tp]`, output whole. No bias.

    Args:
        size_in: Width of the input over all ranks.
        size_out: Width of the output.
        std: Standard deviation of the initial weights.
        mesh: Ranks that hold the layer.
        partial: Whether the output is this rank's share of the sum only; `reduce_from_ranks` completes it.
    """

    def __init__(self, size_in: int, size_out: int, *, std: float, mesh: Mesh, partial: bool = False):
        super().__init__(
            size_in,
            size_out,
            config=_megatron_config(mesh.tp_group.size(), mesh.sequence_parallel),
            init_method=_never_called,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tp_group,
        )
        self.partial = partial
        attach(self.weight, ParameterSpec(std=std, partition_dim=1, sizes=("width", "width")))

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's `[T, B, in / tp]` to residual activations, or to its share `[T, B, out]` if `partial`."""
        plain = self.partial or _is_plain(self.tp_group)
        return linear(x, self.weight) if plain else super().forward(x)[0]


class Embedding(VocabParallelEmbedding):
    """Token embedding with the vocabulary split over ranks."""

    def __init__(self, entries: int, size: int, *, std: float, mesh: Mesh):
        super().__init__(
            entries,
            size,
            init_method=_never_called,
            reduce_scatter_embeddings=mesh.sequence_parallel,
            config=_megatron_config(mesh.tp_group.size(), mesh.sequence_parallel),
            tp_group=mesh.tp_group,
        )
        attach(self.weight, ParameterSpec(std=std, partition_dim=0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[B, T]` to residual activations."""
        if _is_plain(self.tp_group):
            return F.embedding(tokens, self.weight).transpose(0, 1)
        x = super().forward(tokens)
        return x if self.reduce_scatter_embeddings else x.transpose(0, 1)


def cross_entropy_sum(logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
    """Sum the cross-entropy in nats over all targets that are not `IGNORED_TARGET`, in float32.

    `logits` are this rank's share `[..., V / tp]`, `targets` `[...]` int64 indices into the whole vocabulary.
    """
    if logits.device.type != "cpu" and torch.is_grad_enabled():
        if not logits.is_contiguous() and logits.dim() == 3:  # a model's are a view of tokens first
            logits, targets = logits.transpose(0, 1), targets.transpose(0, 1)
        flat = logits.reshape(-1, logits.shape[-1])
        share = vocabulary_share(flat.shape[-1], mesh)
        return cross_entropy_in_pieces(flat, targets.reshape(-1), ignored=IGNORED_TARGET, share=share)
    flat, targets = logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if mesh.tp_group.size() == 1:
        return F.cross_entropy(flat, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    counted = targets != IGNORED_TARGET
    # Megatron's kernel overwrites float32 logits.
    losses = vocab_parallel_cross_entropy(flat.clone(), targets.masked_fill(~counted, 0))
    return (losses * counted).sum()


def vocabulary_share(entries: int, mesh: Mesh) -> VocabularyShare | None:
    """Return this rank's part of a vocabulary, of which it has so many entries; None if it has all."""
    group = mesh.tp_group
    if group.size() == 1:
        return None
    maximum, total = (partial(dist.all_reduce, op=op, group=group) for op in (dist.ReduceOp.MAX, dist.ReduceOp.SUM))
    return VocabularyShare(group.rank() * entries, maximum, total)
