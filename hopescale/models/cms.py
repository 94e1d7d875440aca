"""The continuum memory system (Nested Learning, Eq. 70-74): MLP levels, each with its own outer cadence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.schema import LevelConfig, ModelConfig
from hopescale.models.norm import StreamNorm
from hopescale.ops.backends import Backend
from hopescale.ops.fused import is_fused
from hopescale.ops.gated_mlps import GatedMlp, can_run_mlps, gated_mlps
from hopescale.ops.vectors import can_map
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens, reduce_from_ranks, share_with_ranks

LevelWeights = Mapping[str, Tensor]
"""All weights of a level, by their names in it, one for each sequence in place of its own: `[B, *shape]`."""


class Level(nn.Module):
    """A gated MLP, `down(silu(gate x) * up x)`, hidden width split over tensor-parallel ranks.

    Sequences may have weights of their own (in-context levels); then the products are one for each sequence.

    Args:
        d_model: Width of the residual stream.
        d_ff: Hidden width.
        norm_eps: Term of the RMSNorm in front; None leaves that out (`independent`, where levels share one).
        out_std: Standard deviation of the last matrix's initial weights.
        mesh: Ranks of the run, and this process among them.
        backend: Code that runs all operations but products of matrices.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, norm_eps: float | None, out_std: float, mesh: Mesh, backend: Backend = "auto"
    ):
        super().__init__()
        alone = norm_eps is not None
        self.mesh, self.backend = mesh, backend
        self.norm = StreamNorm(d_model, eps=norm_eps, mesh=mesh, backend=backend) if alone else None
        self.gate = ColumnLinear(d_model, d_ff, std=d_model**-0.5, mesh=mesh, shared_input=True)
        self.up = ColumnLinear(d_model, d_ff, std=d_model**-0.5, mesh=mesh, shared_input=True)
        self.down = RowLinear(d_ff, d_model, std=out_std, mesh=mesh, partial=not alone)

    def forward(self, x: Tensor, weights: LevelWeights | None = None) -> Tensor:
        """Map all tokens, normed, `[T, B, N]` to the level's addition; without a norm, to this rank's part of it."""
        if weights is not None:
            gate, up, down = (weights[f"{name}.weight"] for name in ("gate", "up", "down"))
            share = _product(F.silu(_product(x, gate)) * _product(x, up), down)
            return share if self.norm is None else reduce_from_ranks(share, self.mesh)
        maps = self.gate, self.up  # inputs are whole on every rank, so that these are products and nothing else
        if is_fused(self.backend, x) and not any(each._forward_hooks or each._forward_pre_hooks for each in maps):
            from hopescale.ops.fused.swiglu import swiglu

            return self.down(swiglu(x, self.gate.weight, self.up.weight))
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def after(self, x: Tensor, added: Tensor | None, weights: LevelWeights | None = None) -> tuple[Tensor, Tensor]:
        """Return `x + added`, and the level's addition to that, its norm included."""
        x, normed = self.norm(x, added, None if weights is None else weights["norm.weight"])
        return x, self(gather_tokens(normed, self.mesh), weights)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Map `[T, B, N]` to `[T, B, M]`, each sequence by a weight of its own, `[B, M, N]`."""
    return torch.einsum("tbn,bmn->tbm", x, weight.to(x.dtype))


class ContinuumMemory(nn.Module):
    """The levels of one block, residual connection included.

    `sequential`: `x <- x + level(norm(x))`, fast to slow (Eq. 73). `independent`: `x + sum_l mix_l level_l(norm(x))`
    (Eq. 74), communicating once for all levels. One level of period 1 is exactly a Transformer's MLP.

    Args:
        model: Sizes and switches.
        levels: Levels of the block by name, fast to slow.
        out_scale: Factor on the standard deviation of the last matrices' initial weights.
        mesh: Ranks of the run, and this process among them.
        backend: Code that runs all operations but products of matrices.
    """

    def __init__(
        self,
        model: ModelConfig,
        levels: Mapping[str, LevelConfig],
        *,
        out_scale: float,
        mesh: Mesh,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.mesh, self.backend, self.eps = mesh, backend, model.norm_eps
        self.sequential = model.cms.variant == "sequential"
        shared = {"norm_eps": model.norm_eps if self.sequential else None, "mesh": mesh, "backend": backend}
        self.levels = nn.ModuleDict(
            {
                name: Level(model.d_model, level.d_ff, out_std=out_scale * level.d_ff**-0.5, **shared)
                for name, level in levels.items()
            }
        )
        if not self.sequential:
            self.norm = StreamNorm(model.d_model, eps=model.norm_eps, mesh=mesh, backend=backend)
            self.mix = new_parameter(len(levels), spec=ParameterSpec(mean=len(levels) ** -0.5, keep_fp32=True))

    def forward(
        self, x: Tensor, added: Tensor | None = None, weights: Mapping[str, LevelWeights] | None = None
    ) -> Tensor:
        """Return the residual stream `x + added`, or `x`, plus the additions of the levels.

        `weights` are those of levels, by name, that each sequence has for itself.
        """
        own = weights or {}
        if self.sequential:
            mlps = None if own else self._plain_mlps(x)
            if mlps is not None:
                return gated_mlps(x, added, mlps, self.eps)
            for name, level in self.levels.items():
                x, added = level.after(x, added, own.get(name))
            return x + added
        x, normed = self.norm(x, added)
        shared = gather_tokens(normed, self.mesh)
        mix = share_with_ranks(self.mix, self.mesh).to(x.dtype)
        added = (level(shared, own.get(name)) for name, level in self.levels.items())
        parts = sum(share * each for share, each in zip(mix, added, strict=True))
        return x + reduce_from_ranks(parts, self.mesh)

    def _plain_mlps(self, x: Tensor) -> list[GatedMlp] | None:
        """Return the weights of levels that one operation can run for `x`; None if there is more to them."""
        if self.backend not in ("auto", "cpp") or self.mesh.tp_group.size() > 1 or not can_map(x):
            return None
        mlps = []
        for level in self.levels.values():
            parts = level._modules  # torch's own look-ups take longer than a token's MLP
            if any(each._forward_hooks or each._forward_pre_hooks for each in (level, *parts.values())):
                return None
            mlps.append(GatedMlp(*[parts[name]._parameters["weight"] for name in GatedMlp._fields]))
        return mlps if can_run_mlps(x, mlps) else None
