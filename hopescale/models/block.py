"""One block: a mixer over tokens, then the continuum memory system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim, levels_of_block, mixer_of_block
from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.attention import Attention
from hopescale.models.cms import ContinuumMemory, LevelWeights
from hopescale.models.lean_block import LeanBlock
from hopescale.models.linear_attention import LinearAttention
from hopescale.models.norm import StreamNorm
from hopescale.models.recompute import recomputed
from hopescale.models.self_modifying import SelfModifying
from hopescale.models.state import GroupedState, LayerState
from hopescale.models.titans import Titans
from hopescale.models.ttt import Ttt
from hopescale.ops.backends import Backend, KernelPrecision, Recompute
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh

MIXERS: dict[str, type[nn.Module]] = {
    "self_modifying": SelfModifying,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "titans": Titans,
    "ttt": Ttt,
}
"""The module of each kind of mixer."""


class Block(nn.Module):
    """`x <- x + mixer(norm(x))`, then `x <- cms(x)`.

    Args:
        config: Sizes and switches.
        number: Number of the block in the model, from 0.
        mesh: Ranks of the run, and this process among them.
        recompute: Activations that the backward pass computes again: those of the `block`, of its mixer (`memory`), or
            of the `chunks` of its memories, from the states they start with. The first two do the third as well. So
            does `reverse`, which computes most of these states again, too.
        compiled: Whether a chunk of the memories is compiled.
        backend: Code that runs memories and the operations around them.
        kernel_precision: Operands of its products.
    """

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        mesh: Mesh,
        recompute: Recompute = "none",
        compiled: bool = False,
        backend: Backend = "auto",
        kernel_precision: KernelPrecision = "auto",
    ):
        super().__init__()
        self.recompute = recompute
        # Two additions to the residual stream per block, at least: their variance must not grow with depth.
        out_scale = (2 * config.num_layers) ** -0.5
        out_std = out_scale * (config.num_heads * head_dim(config)) ** -0.5
        self.norm = StreamNorm(config.d_model, eps=config.norm_eps, mesh=mesh, backend=backend)
        mixer = mixer_of_block(config, number)
        given: dict[str, Any] = {"out_std": out_std, "mesh": mesh}
        if isinstance(mixer, SelfModifyingConfig):
            given |= {"recompute": recompute, "compiled": compiled}
            given |= {"backend": backend, "kernel_precision": kernel_precision}
        self.mixer = MIXERS[mixer.kind](config, mixer, **given)
        how = {"out_scale": out_scale, "mesh": mesh, "backend": backend}
        self.cms = ContinuumMemory(config, levels_of_block(config, number), **how)
        self.lean = LeanBlock()

    def forward(
        self,
        x: Tensor,
        state: LayerState | GroupedState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
        levels: Mapping[str, LevelWeights] | None = None,
    ) -> tuple[Tensor, LayerState | GroupedState]:
        """Map the residual stream to itself, and return the mixer's state.

        `documents` are those of all tokens; `probe` is for memories only: attention fills nothing in. `levels` are
        weights of levels that each sequence has for itself. A state of groups takes neither documents nor a probe.
        """
        if self.recompute == "block":
            return recomputed(self._forward, x, state, documents, levels, probe=probe)
        return self._forward(x, state, documents, levels, probe)

    def _forward(
        self,
        x: Tensor,
        state: LayerState | GroupedState | None,
        documents: Documents | None,
        levels: Mapping[str, LevelWeights] | None,
        probe: dict[str, Tensor] | None,
    ) -> tuple[Tensor, LayerState | GroupedState]:
        if documents is None and probe is None and not levels:
            mapped = self.lean.run(self, x, state)
            if mapped is not None:
                return mapped
        x, normed = self.norm(x)
        if self.recompute == "memory":
            y, state = recomputed(self._mix, normed, state, documents, probe=probe)
        else:
            y, state = self._mix(normed, state, documents, probe)
        return self.cms(x, y, levels), state

    def _mix(
        self,
        x: Tensor,
        state: LayerState | GroupedState | None,
        documents: Documents | None,
        probe: dict[str, Tensor] | None,
    ) -> tuple[Tensor, LayerState | GroupedState]:
        if isinstance(state, GroupedState):
            parts = zip(x.split(state.sizes, dim=1), state.groups, strict=True)
            mixed, groups = zip(*(self.mixer(part, each) for part, each in parts), strict=True)
            return torch.cat(mixed, dim=1), state._replace(groups=groups)
        return self.mixer(x, state, documents, probe)
