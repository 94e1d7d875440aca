"""The continuum memory system (Nested Learning, Eq. 70-74): MLP levels, each with its own outer cadence."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.schema import LevelConfig, ModelConfig
from hopescale.models.norm import stream_norm
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens, reduce_from_ranks, share_with_ranks


class Level(nn.Module):
    """A gated MLP, `down(silu(gate x) * up x)`, hidden width split over tensor-parallel ranks.

    Args:
        d_model: Width of the residual stream.
        d_ff: Hidden width.
        norm_eps: Term of the RMSNorm in front; None leaves that out (`independent`, where levels share one).
        out_std: Standard deviation of the last matrix's initial weights.
        mesh: Ranks of the run, and this process among them.
    """

    def __init__(self, d_model: int, d_ff: int, *, norm_eps: float | None, out_std: float, mesh: Mesh):
        super().__init__()
        alone = norm_eps is not None
        self.mesh = mesh
        self.norm = stream_norm(d_model, eps=norm_eps, mesh=mesh) if alone else None
        self.gate = ColumnLinear(d_model, d_ff, std=d_model**-0.5, mesh=mesh, shared_input=True)
        self.up = ColumnLinear(d_model, d_ff, std=d_model**-0.5, mesh=mesh, shared_input=True)
        self.down = RowLinear(d_ff, d_model, std=out_std, mesh=mesh, partial=not alone)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream to what the level adds to it, norm included.

        A level without a norm maps all tokens `[T, B, N]` to this rank's share of a sum `[T, B, N]`.
        """
        if self.norm is not None:
            x = gather_tokens(self.norm(x), self.mesh)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ContinuumMemory(nn.Module):
    """The levels of one block, residual connection included.

    `sequential`: `x <- x + level(norm(x))`, fast to slow (Eq. 73). `independent`: `x + sum_l mix_l level_l(norm(x))`
    (Eq. 74), communicating once for all levels. One level of period 1 is exactly a Transformer's MLP.

    Args:
        model: Sizes and switches.
        levels: Levels of the block by name, fast to slow.
        out_scale: Factor on the standard deviation of the last matrices' initial weights.
        mesh: Ranks of the run, and this process among them.
    """

    def __init__(self, model: ModelConfig, levels: Mapping[str, LevelConfig], *, out_scale: float, mesh: Mesh):
        super().__init__()
        self.mesh, self.sequential = mesh, model.cms.variant == "sequential"
        shared = {"norm_eps": model.norm_eps if self.sequential else None, "mesh": mesh}
        self.levels = nn.ModuleDict(
            {
                name: Level(model.d_model, level.d_ff, out_std=out_scale * level.d_ff**-0.5, **shared)
                for name, level in levels.items()
            }
        )
        if not self.sequential:
            self.norm = stream_norm(model.d_model, eps=model.norm_eps, mesh=mesh)
            self.mix = new_parameter(len(levels), spec=ParameterSpec(mean=len(levels) ** -0.5, keep_fp32=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream to itself plus what the levels add."""
        if self.sequential:
            for level in self.levels.values():
                x = x + level(x)
            return x
        shared = gather_tokens(self.norm(x), self.mesh)
        weights = share_with_ranks(self.mix, self.mesh).to(x.dtype)
        parts = sum(weight * level(shared) for weight, level in zip(weights, self.levels.values(), strict=True))
        return x + reduce_from_ranks(parts, self.mesh)
