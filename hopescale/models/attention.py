"""Causal softmax attention with rotary positions, through torch's fused kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim, kv_heads, qkv_parts
from hopescale.config.schema import AttentionConfig, ModelConfig
from hopescale.config.transfer import attention_scale
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.ops.documents import Documents
from hopescale.ops.rope import rope_frequencies, rope_tables, rotate, slow_down
from hopescale.parallel.layers import ColumnLinear, RowLinear
from hopescale.parallel.mesh import Mesh

LEAST_APART = 64
"""Mean tokens of a document from which on documents are read one by one, rather than all under a mask."""


class AttentionCache(NamedTuple):
    """Keys and values of the tokens read so far, or of the last `window` of them, `[B, G, T, D]`."""

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """Multi-head or grouped-query attention, over all tokens or within a sliding window.

    Its state is the keys and values of the tokens read: it grows with them, up to the window if there is one.

    Args:
        model: Sizes; the head dim `D` is even, and heads are split over tensor-parallel ranks.
        mixer: Switches.
        out_std: Standard deviation of the out-projection's initial weights. None makes a part of another mixer:
            `answer` then gets all tokens on every rank, and nothing is projected out.
        mesh: Ranks of the run, and this process among them.
    """

    def __init__(self, model: ModelConfig, mixer: AttentionConfig, *, out_std: float | None, mesh: Mesh):
        super().__init__()
        width, groups = model.d_model, kv_heads(model, mixer)
        self.config, self.head_dim, self.scale = mixer, head_dim(model), attention_scale(model)
        self.kv_heads, self.shared_by = groups // mesh.tp_group.size(), model.num_heads // groups
        # Queries, then key and value of each group side by side, so that a rank holds whole groups.
        size = (model.num_heads + 2 * groups) * self.head_dim
        how = {"std": width**-0.5, "bias": self.config.qkv_bias, "shared_input": out_std is None}
        how["parts"] = qkv_parts(model, mixer)
        self.qkv_proj = ColumnLinear(width, size, mesh=mesh, **how)
        if out_std is not None:
            self.out_proj = RowLinear(model.num_heads * self.head_dim, width, std=out_std, mesh=mesh)
        norm = {"eps": model.norm_eps, "shared_over": mesh}
        self.q_norm = RMSNorm(self.head_dim, **norm) if self.config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, **norm) if self.config.qk_norm else None

    def initial_state(self, batch: int) -> LayerState:
        """Return an empty cache for `batch` sequences."""
        empty = self.qkv_proj.weight.new_zeros(batch, self.kv_heads, 0, self.head_dim)
        return LayerState(0, AttentionCache(empty, empty))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: Keys and values of earlier tokens; None begins without any.
            documents: Documents of all tokens; None treats a sequence as one.
            probe: Dict that stays as it is: attention has no statistics.

        Returns:
            Residual activations and the state after the last token.

        Raises:
            ValueError: If documents are not those of the tokens, or go on from earlier tokens without their keys, or
                the reverse.
        """
        y, state = self.answer(x, state, documents)
        return self.out_proj(y.flatten(2)), state

    def answer(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens as `forward` does, without the output projection: answers of this rank's heads `[T, B, H, D]`.

        `prefix` `[P, N]` is read before each document and stays in sight of all tokens, whatever the window. It takes
        the first positions; it is no part of the state.
        """
        state = self.initial_state(x.shape[1]) if state is None else state
        ahead, before = None, 0
        if prefix is not None:
            ahead, before = AttentionCache(*self.project(prefix[:, None], 0)[1:]), len(prefix)
        q, k, v, first = self._project(x, before, state.position, documents)
        if state.position:
            k, v = torch.cat([state.tensors.k, k], dim=2), torch.cat([state.tensors.v, v], dim=2)
        if ahead is None and documents is not None and self._reads_apart(documents):
            y = self._attend_apart(q, k, v, documents)
        else:
            y = self._attend(q, k, v, first, ahead)
        return y.permute(2, 0, 1, 3), LayerState(
            state.position + q.shape[2], AttentionCache(self._last(k), self._last(v))
        )

    def project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[B, H, T, D]`, and keys and values `[B, G, T, D]`, rotated by positions from `start` on."""
        return self._project(x, start, 0, None)[:3]

    def _project(
        self, x: Tensor, before: int, position: int, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Project as `project` does; positions begin with `before` in each document. Also return where these begin."""
        mixed = self.qkv_proj(x).unflatten(-1, (self.kv_heads, self.shared_by + 2, self.head_dim))
        tokens = mixed.shape[0]
        q, k, v = mixed.permute(1, 2, 3, 0, 4).split([self.shared_by, 1, 1], dim=2)  # [B, G, ., T, D]
        q, k, v = q.flatten(1, 2), k[:, :, 0], v[:, :, 0]  # [B, H, T, D], [B, G, T, D]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        first = None if documents is None else documents.first_of(q.shape[0], tokens, position)
        start = before + (position if first is None else 0)
        tables = rope_tables(start, tokens, self._frequencies(x.device), first)
        return rotate(q, tables), rotate(k, tables), v, first

    def _last(self, x: Tensor) -> Tensor:
        """Return the keys and values that later tokens may see, in memory of their own."""
        window = self.config.window
        return x if window is None or x.shape[2] <= window else x[:, :, -window:].clone()

    def _frequencies(self, device: torch.device) -> Tensor:
        frequencies, scaling = rope_frequencies(self.head_dim, self.config.rope_theta, device), self.config.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.kind == "linear":
            return frequencies / scaling.factor
        ramp = (scaling.low_freq_factor, scaling.high_freq_factor)
        return slow_down(frequencies, scaling.factor, *ramp, scaling.first_context)

    def _reads_apart(self, documents: Documents) -> bool:
        """Tell whether documents are read one by one, which costs least where they are long and see all of their own.

        A mask lets every query look at all keys of its sequence first.
        """
        lengths, window = documents.lengths, self.config.window
        fits = window is None or max(map(sum, zip(lengths, documents.before, strict=True))) <= window
        return fits and len(lengths) * LEAST_APART <= documents.first.numel()

    def _attend_apart(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        """Let queries `[B, H, T, D]` read keys and values `[B, G, P + T, D]`, one document after the other."""
        lengths, before, tokens = documents.lengths, documents.before, q.shape[2]
        sizes, past = [], k.shape[2] - tokens
        for begin, length, earlier in zip(documents.bounds, lengths, before, strict=False):
            # In front of a row's keys lie those of documents that have ended.
            sizes += [past - earlier] * (begin % tokens == 0) + [earlier + length]
        rows = iter(zip(*(x.transpose(0, 1).flatten(1, 2).split(sizes, dim=1) for x in (k, v)), strict=True))
        answers = []
        queries = q.transpose(0, 1).flatten(1, 2).split(lengths, dim=1)
        for begin, part, earlier in zip(documents.bounds, queries, before, strict=False):
            if begin % tokens == 0:
                next(rows)
            mask = _visible(part.shape[1], earlier, None, None, q.device)
            answers.append(self.read(part[None], *(x[None] for x in next(rows)), mask)[0])
        return torch.cat(answers, dim=1).unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor | None, ahead: AttentionCache | None) -> Tensor:
        """Let queries `[B, H, T, D]` read keys and values `[B, G, P + T, D]`, the first `P` of earlier tokens.

        Places of the first tokens of the queries' documents are `firsts`. Those `ahead` are read by all.
        With a window of `W`, the first `W` queries are one block. Each later block of `W` reads its own keys and those
        of the block before, so that a query is compared with `2 W` keys at most.
        """
        tokens, window = q.shape[2], self.config.window
        past = k.shape[2] - tokens
        if window is None or past + tokens <= window:
            return self.read(q, k, v, _visible(tokens, past, firsts, None, q.device), ahead)
        size = min(window, tokens)
        mask = _visible(size, past, None if firsts is None else firsts[:, :size], window, q.device)
        first = self.read(q[:, :, :size], k[:, :, : past + size], v[:, :, : past + size], mask, ahead)
        if size == tokens:
            return first
        later = tokens - size
        padding = -later % size
        blocks = (later + padding) // size
        mask = _visible(size, size, None, window, q.device)
        if firsts is not None:
            own = F.pad(firsts[:, size:], (0, padding)).view(-1, 1, size, 1)
            other = F.pad(firsts, (0, padding)).unfold(1, 2 * size, size).reshape(-1, 1, 1, 2 * size)
            mask = mask & (own == other) | torch.eye(2 * size, dtype=torch.bool, device=q.device)[size:]

        def pairs_of_blocks(x: Tensor) -> Tensor:
            x = F.pad(x[:, :, past:], (0, 0, 0, padding)).unfold(2, 2 * size, size)  # [B, G, blocks, D, 2 W]
            return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

        queries = F.pad(q[:, :, size:], (0, 0, 0, padding)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
        rest = self.read(queries, pairs_of_blocks(k), pairs_of_blocks(v), mask, ahead)
        rest = rest.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :later]
        return torch.cat([first, rest], dim=2)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ahead: AttentionCache | None = None) -> Tensor:
        """Let queries read keys and values where `mask` is true, and all `ahead`, which are for a batch of one.

        Without a mask each query reads up to the key of its own number.
        """
        if ahead is not None:
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = F.pad(mask, (ahead.k.shape[2], 0), value=True)
            k, v = (
                torch.cat([x.expand(len(own), -1, -1, -1), own], dim=2) for x, own in zip(ahead, (k, v), strict=True)
            )
        shared = self.shared_by > 1
        if shared and mask is not None and q.device.type != "cpu":
            # On a GPU none of the kernels that spare the matrix of scores takes a mask and shared keys at once.
            k, v, shared = (*(x.repeat_interleave(self.shared_by, dim=1) for x in (k, v)), False)
        how = {"is_causal": mask is None, "enable_gqa": shared, "scale": self.scale}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)


def _visible(tokens: int, past: int, firsts: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """Return where queries may look, `[T, P + T]` or `[B, 1, T, P + T]`; None where they see all up to their own token.

    Args:
        tokens: Number of queries, `T`.
        past: Number of keys before that of the first query, `P`.
        firsts: Place of the first token of each query's document `[B, T]`, negative among the past keys; None if all
            are of one document, the past ones too.
        window: Number of keys that a query sees; None is no limit.
        device: Device of the mask.
    """
    if not past and firsts is None and (window is None or tokens <= window):
        return None
    own = torch.arange(past, past + tokens, device=device)[:, None]
    other = torch.arange(past + tokens, device=device)
    mask = own >= other
    if window is not None:
        mask = mask & (own - other < window)
    if firsts is not None:
        mask = mask & (other - past >= firsts[:, None, :, None])
    return mask
