"""Causal softmax attention with rotary positions, through torch's fused kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim, kv_heads
from hopescale.config.schema import ModelConfig
from hopescale.config.transfer import attention_scale
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.ops.rope import rope_frequencies, rope_tables, rotate, slow_down
from hopescale.parallel.layers import ColumnLinear, RowLinear
from hopescale.parallel.mesh import Mesh


class AttentionCache(NamedTuple):
    """Keys and values of all tokens read so far, `[B, G, T, D]`."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Multi-head or grouped-query attention. Its state is the keys and values of all tokens read: it grows with them.

    Args:
        model: Sizes and switches; the head dim `D` is even, and heads are split over tensor-parallel ranks.
        out_std: Standard deviation of the out-projection's initial weights.
        mesh: Ranks of the run, and this process among them.
    """

    def __init__(self, model: ModelConfig, *, out_std: float, mesh: Mesh):
        super().__init__()
        width, groups = model.d_model, kv_heads(model)
        self.config, self.head_dim, self.scale = model.attention, head_dim(model), attention_scale(model)
        self.kv_heads, self.shared_by = groups // mesh.tp_group.size(), model.num_heads // groups
        # Queries, then key and value of each group side by side, so that a rank holds whole groups.
        size = (model.num_heads + 2 * groups) * self.head_dim
        self.qkv_proj = ColumnLinear(width, size, std=width**-0.5, mesh=mesh, bias=self.config.qkv_bias)
        self.out_proj = RowLinear(model.num_heads * self.head_dim, width, std=out_std, mesh=mesh)
        norm = {"eps": model.norm_eps, "shared_over": mesh}
        self.q_norm = RMSNorm(self.head_dim, **norm) if self.config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, **norm) if self.config.qk_norm else None

    def initial_state(self, batch: int) -> LayerState:
        """Return an empty cache for `batch` sequences."""
        empty = self.qkv_proj.weight.new_zeros(batch, self.kv_heads, 0, self.head_dim)
        return LayerState(0, AttentionCache(empty, empty))

    def forward(
        self, x: Tensor, state: LayerState | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: Keys and values of earlier tokens; None begins without any.
            document_ids: `[B, T]`; used with `within_documents`, where `None` treats all tokens as one document.

        Returns:
            Residual activations and the state after the last token.

        Raises:
            ValueError: If document ids are given together with earlier tokens, whose documents are unknown.
        """
        state = self.initial_state(x.shape[1]) if state is None else state
        mixed = self.qkv_proj(x).unflatten(-1, (self.kv_heads, self.shared_by + 2, self.head_dim))
        tokens = mixed.shape[0]
        q, k, v = mixed.permute(1, 2, 3, 0, 4).split([self.shared_by, 1, 1], dim=2)  # [B, G, ., T, D]
        q, k, v = q.flatten(1, 2), k[:, :, 0], v[:, :, 0]  # [B, H, T, D], [B, G, T, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = rope_tables(state.position, tokens, self._frequencies(x.device))
        q, k = rotate(q, tables), rotate(k, tables)
        if state.position:
            k, v = torch.cat([state.tensors.k, k], dim=2), torch.cat([state.tensors.v, v], dim=2)
        mask = self._mask(state.position, tokens, document_ids, x.device)
        how = {"is_causal": mask is None, "enable_gqa": self.shared_by > 1, "scale": self.scale}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)
        y = self.out_proj(y.permute(2, 0, 1, 3).flatten(2))
        return y, LayerState(state.position + tokens, AttentionCache(k, v))

    def _frequencies(self, device: torch.device) -> Tensor:
        frequencies, scaling = rope_frequencies(self.head_dim, self.config.rope_theta, device), self.config.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        ramp = (scaling.low_freq_factor, scaling.high_freq_factor)
        return slow_down(frequencies, scaling.factor, *ramp, scaling.first_context)

    def _mask(self, position: int, tokens: int, document_ids: Tensor | None, device: torch.device) -> Tensor | None:
        """True where a token may look; None for plain causal attention from position 0."""
        separate = self.config.within_documents and document_ids is not None
        if not position and not separate:
            return None
        if position and separate:
            raise ValueError("document_ids are given, but the documents of the tokens in the state are unknown")
        rows = torch.arange(position, position + tokens, device=device)
        mask = rows[:, None] >= torch.arange(position + tokens, device=device)
        if separate:
            mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])  # [B, 1, T, T]
        return mask
