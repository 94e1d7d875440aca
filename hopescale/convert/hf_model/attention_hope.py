"""Softmax attention of Hope-Attention, Transformers and hybrids. Its cache is keys and values, at most of a window."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns_hope import Columns, Norm, State


class HopeAttention(nn.Module):
    """Causal softmax attention, heads of queries in groups that share a key and a value, with rotary positions."""

    def __init__(self, model: SimpleNamespace, config: SimpleNamespace, dim: int, *, is_whole: bool = True):
        super().__init__()
        transfer = model.transfer
        self.config, self.dim, self.scale = config, dim, None
        self.window = config.window
        if transfer is not None and transfer.base_head_dim not in (None, dim):
            self.scale = transfer.base_head_dim**0.5 / dim  # products of wider heads, as at the base width
        self.groups = config.num_kv_heads or model.num_heads
        self.shared_by = model.num_heads // self.groups
        size = (model.num_heads + 2 * self.groups) * dim
        self.qkv_proj = nn.Linear(model.d_model, size, bias=config.qkv_bias)
        if is_whole:
            self.out_proj = nn.Linear(model.num_heads * dim, model.d_model, bias=False)
        self.q_norm = Norm(dim, eps=model.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(dim, eps=model.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; the state is the keys and values of the columns, padding included."""
        y, state = self.answer(x, state, columns.real, columns.padded)
        return self.out_proj(y), state

    def answer(
        self, x: Tensor, state: State, real: Tensor, padded: bool, ahead: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Mix tokens as `forward` does, without the output projection: `[B, T, H * D]`.

        Args:
            x: Tokens `[B, T, N]`.
            state: Keys and values of earlier columns; empty before the first.
            real: `[B, past + T]`, tokens among all columns.
            padded: Whether any column is padding.
            ahead: Keys and values `[1, G, P, D]` in sight of all tokens; the tokens' positions begin behind them.
        """
        tokens, before = x.shape[1], 0 if ahead is None else ahead[0].shape[2]
        total = real.shape[1]
        places = real.cumsum(-1) - 1 if padded else torch.arange(total, device=x.device)[None]
        q, k, v = self.project(x, places[:, -tokens:] + before)
        if state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        kept = self._kept(real, padded)
        state = {"k": k[:, :, -kept:], "v": v[:, :, -kept:]}
        if tokens == 1 and not padded:
            k, v, mask = state["k"], state["v"], None
        else:
            mask = self._mask(tokens, real[:, -k.shape[2] :], padded)
        if ahead is not None:
            if mask is None and tokens > 1:
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            mask = None if mask is None else F.pad(mask, (before, 0), value=True)
            k, v = (
                torch.cat([one.expand(len(x), -1, -1, -1), own], dim=2) for one, own in zip(ahead, (k, v), strict=True)
            )
        return self.read(q, k, v, mask), state

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[B, H, T, D]`, and keys and values `[B, G, T, D]`, rotated by positions `[B, T]`."""
        batch, tokens = x.shape[:2]
        mixed = F.linear(x, self.qkv_proj.weight)
        mixed = mixed if self.qkv_proj.bias is None else mixed + self.qkv_proj.bias  # rounds as hopescale does
        mixed = mixed.view(batch, tokens, self.groups, self.shared_by + 2, self.dim).permute(0, 2, 3, 1, 4)
        q, k, v = mixed.split([self.shared_by, 1, 1], dim=2)
        q, k, v = q.flatten(1, 2), k[:, :, 0], v[:, :, 0]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        angles = positions.clamp_min(0)[:, None, :, None].float() * self._frequencies(x.device)
        turn = angles.cos().to(q.dtype), angles.sin().to(q.dtype)  # [B, 1, T, D / 2]
        return _rotated(q, *turn), _rotated(k, *turn), v

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Let queries read keys and values where `mask` is true, or up to their own number: `[B, T, H * D]`.

        Without a mask a single query reads all.
        """
        how = {"is_causal": mask is None and q.shape[2] > 1, "enable_gqa": self.shared_by > 1, "scale": self.scale}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)
        return y.transpose(1, 2).flatten(2)

    def _kept(self, real: Tensor, padded: bool) -> int:
        """Count the last columns that hold each row's window of tokens; all columns if there is no window."""
        if self.window is None or not padded:
            return min(real.shape[1], self.window or real.shape[1])
        return int((real.flip(1).cumsum(1) < self.window).any(0).sum()) + 1

    def _frequencies(self, device: torch.device) -> Tensor:
        plain = self.config.rope_theta ** (-torch.arange(0, self.dim, 2, device=device).float() / self.dim)
        scaling = self.config.rope_scaling
        if scaling is None:
            return plain
        if scaling.kind == "linear":
            return plain / scaling.factor
        turns = scaling.first_context * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (kept + (1 - kept) / scaling.factor)

    def _mask(self, tokens: int, real: Tensor, padded: bool) -> Tensor | None:
        """True where a column may look, `[B, 1, T, past + T]`; None for plain causal attention."""
        total = real.shape[1]
        if tokens == total and not padded and (self.window is None or tokens <= self.window):
            return None
        own = torch.arange(total - tokens, total, device=real.device)[:, None]
        other = torch.arange(total, device=real.device)
        seen = (own >= other) & real[:, None, :]
        if self.window is not None:
            count = real.cumsum(1)  # padding within the columns takes no place in the window
            seen = seen & (count[:, -tokens:, None] - count[:, None, :] < self.window)
        # Padding sees itself: a softmax over nothing is not a number.
        return (seen | (own == other))[:, None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
