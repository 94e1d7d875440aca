"""One block: a mixer over tokens, then the continuum memory system."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.config.plan import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.models.attention import Attention
from hopescale.models.cms import ContinuumMemory
from hopescale.models.norm import RMSNorm
from hopescale.models.self_modifying import SelfModifying
from hopescale.models.state import LayerState
from hopescale.parallel.mesh import Mesh


class Block(nn.Module):
    """`x <- x + mixer(norm(x))`, then `x <- cms(x)`."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        super().__init__()
        # Two additions to the residual stream per block, at least: their variance must not grow with depth.
        out_scale = (2 * config.num_layers) ** -0.5
        shared = {
            "norm_eps": config.norm_eps,
            "out_std": out_scale * (config.num_heads * head_dim(config)) ** -0.5,
            "mesh": mesh,
        }
        sizes = (config.d_model, config.num_heads, head_dim(config))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        if config.mixer == "attention":
            self.mixer = Attention(*sizes, config.attention, **shared)
        else:
            self.mixer = SelfModifying(*sizes, config.self_modifying, **shared)
        self.cms = ContinuumMemory(config.d_model, config.cms, norm_eps=config.norm_eps, out_scale=out_scale, mesh=mesh)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        document_ids: Tensor | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Map `[T, B, N]` to `[T, B, N]` and the mixer's state.

        `document_ids` reach attention only, `probe` memories only.
        """
        extra = {"document_ids": document_ids} if isinstance(self.mixer, Attention) else {"probe": probe}
        y, state = self.mixer(self.norm(x), state, **extra)
        return self.cms(x + y), state
