"""Titans: a memory composed with attention and persistent tokens (arXiv 2501.00663, section 4)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.titans import titans_attention
from hopescale.models.attention import Attention, AttentionCache
from hopescale.models.norm import RMSNorm
from hopescale.models.persistent import Prefixed
from hopescale.models.row_groups import run_groups
from hopescale.models.self_modifying import MixerState, SelfModifying
from hopescale.models.state import LayerState
from hopescale.models.statistics import by_token, statistics_of
from hopescale.models.titans_context import Context, ContextState, run_documents, run_segments
from hopescale.ops.backends import Backend, KernelPrecision, Recompute
from hopescale.ops.documents import Documents
from hopescale.parallel.layers import ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens, share_with_ranks, sum_over_ranks


class TitansState(NamedTuple):
    """State of the memory, and the cache of attention."""

    memory: MixerState
    attention: AttentionCache


class Titans(nn.Module):
    """Memory as a context (MAC, Eq. 21-25), as a gate (MAG, Eq. 26-28) or as a layer (MAL, Eq. 29-31).

    Heads of the memory and of attention are split over tensor-parallel ranks.

    Args:
        model: Sizes; the head dim is even.
        mixer: Switches, those of the memory among them.
        out_std: Standard deviation of the out-projection's initial weights.
        mesh: Ranks of the run, and this process among them.
        recompute, compiled, backend, kernel_precision: Arguments of the memory, as in `SelfModifying`.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixer: TitansConfig,
        *,
        out_std: float,
        mesh: Mesh,
        recompute: Recompute = "none",
        compiled: bool = False,
        backend: Backend = "auto",
        kernel_precision: KernelPrecision = "auto",
    ):
        super().__init__()
        self.config, self.mesh, self.dim = mixer, mesh, head_dim(model)
        width = model.num_heads * self.dim
        self.persistent = new_parameter(
            mixer.persistent_tokens, model.d_model, spec=ParameterSpec(std=1.0, keep_fp32=True)
        )
        how = {"recompute": recompute, "compiled": compiled}
        how |= {"backend": backend, "kernel_precision": kernel_precision}
        self.memory = SelfModifying(model, mixer, out_std=None, mesh=mesh, **how)
        self.attention = Attention(model, titans_attention(mixer), out_std=None, mesh=mesh)
        if mixer.composition == "mac":
            self.context = Context(model, mesh=mesh)
        if mixer.composition != "mag":
            self.inner_proj = RowLinear(width, model.d_model, std=width**-0.5, mesh=mesh, partial=True)
        if mixer.composition != "mal":
            self.norm = RMSNorm(self.memory.heads, self.dim, eps=model.norm_eps, partition_dim=0)
        self.out_proj = RowLinear(width, model.d_model, std=out_std, mesh=mesh)

    def initial_state(self, batch: int, *, unfinished: bool = False) -> LayerState:
        """Return the learned initial memory and an empty cache for `batch` sequences; neither has read anything.

        It is `unfinished` like a state after a piece of documents.
        """
        cache, is_context = self.attention.initial_state(batch).tensors, self.config.composition == "mac"
        memory = self.memory.initial_state(batch, unfinished=unfinished and not is_context).tensors
        if not is_context:
            return LayerState(0, TitansState(memory, cache))
        like = self.out_proj.weight
        ahead = like.new_zeros(batch, self.config.chunk_size - 1, like.shape[0]) if unfinished else None
        return LayerState(0, ContextState(memory, cache, cache, ahead))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations. Arguments, result and errors are those of `SelfModifying.forward`.

        The state's position counts no persistent tokens. The memory's chunks do with MAG and MAL, where the memory
        reads them.
        """
        state = self.initial_state(x.shape[1]) if state is None else state
        persistent = share_with_ranks(self.persistent, self.mesh).to(x.dtype)
        x = gather_tokens(x, self.mesh)
        run = {"mac": self._as_context, "mag": self._as_gate, "mal": self._as_layer}[self.config.composition]
        if documents is None or not state.position or self.config.composition == "mac":
            y, tensors = run(x, state, documents, probe, persistent=persistent)
        else:
            documents.first_of(x.shape[1], x.shape[0], state.position)
            y, tensors = run_groups(partial(run, persistent=persistent), x, state, documents, probe)
        return self.out_proj(y.flatten(2)), LayerState(state.position + len(x), tensors)

    def _as_context(
        self,
        x: Tensor,
        state: LayerState,
        documents: Documents | None,
        probe: dict[str, Tensor] | None,
        persistent: Tensor,
    ) -> tuple[Tensor, ContextState]:
        """Let attention read each segment with the memory's retrievals for it, and write attention's answers."""
        ahead = AttentionCache(*self.attention.project(persistent[:, None], 0)[1:])
        size, norms = self.config.chunk_size, []

        def run(part: Tensor, tensors: ContextState, position: int) -> tuple[Tensor, Tensor | None, ContextState]:
            stats: dict[str, Tensor] | None = None if probe is None else {}
            y, tensors = self._segment(part, ahead, tensors, position, stats)
            if stats is None:
                return y, None, tensors
            norms.append(stats["state_norm"])
            return y, by_token(stats, part.shape[1], self.memory.heads), tensors

        if documents is None:
            y, values, tensors = run_segments(run, x, state.tensors, state.position, size)
        else:
            documents.first_of(x.shape[1], x.shape[0], state.position)
            before = state.tensors if state.position else None
            how = documents, size, before
            y, values, tensors = run_documents(run, x, lambda batch: self.initial_state(batch).tensors, *how)
        if probe is not None:
            probe |= statistics_of(values, norms)
        return y, tensors

    def _segment(
        self, x: Tensor, ahead: AttentionCache, state: ContextState, position: int, probe: dict[str, Tensor] | None
    ) -> tuple[Tensor, ContextState]:
        """Run a segment, or a part of one; persistent tokens come first, then the retrieved ones, then the segment's.

        A token sees what was retrieved for it and for those before it: what was retrieved for later ones would tell of
        them.
        """
        size, count = self.config.chunk_size, self.config.persistent_tokens
        place, memory = position % size, state.memory.memory
        known = memory.boundary if place else memory.running
        retrieved = self.context(x, self.memory.spec, known)
        _, *context = self.attention.project(retrieved, count + place)
        q, *own = self.attention.project(x, count + size + place)
        if place:
            context = [torch.cat(pair, dim=2) for pair in zip(state.context, context, strict=True)]
            own = [torch.cat(pair, dim=2) for pair in zip(state.attention, own, strict=True)]
        k, v = (torch.cat(pair, dim=2) for pair in zip(context, own, strict=True))
        seen = torch.ones(len(x), own[0].shape[2], dtype=torch.bool, device=x.device).tril(own[0].shape[2] - len(x))
        seen = self.attention.read(q, k, v, seen.repeat(1, 2), ahead).permute(2, 0, 1, 3)
        written = sum_over_ranks(self.inner_proj(seen.flatten(2)), self.mesh)
        remembered, after = self.memory.answer(written, LayerState(position, state.memory), probe=probe)
        parts = context, own
        if (position + len(x)) % size == 0:
            parts = ([x[:, :, :0].clone() for x in part] for part in parts)
        context, own = (AttentionCache(*part) for part in parts)
        memory = after.tensors._replace(memory=after.tensors.memory._replace(boundary=known))
        return self._gated(seen, remembered), ContextState(memory, own, context)

    def _as_gate(
        self,
        x: Tensor,
        state: LayerState,
        documents: Documents | None,
        probe: dict[str, Tensor] | None,
        persistent: Tensor,
    ) -> tuple[Tensor, TitansState]:
        """Let the memory gate attention's answers `[T, B, H, D]`. Persistent tokens stay in attention's sight."""
        wide, (remembered, memory) = self._remember(x, state, documents, probe, persistent)
        now = LayerState(state.position, state.tensors.attention)
        seen, cache = self.attention.answer(x, now, documents, persistent)
        return self._gated(seen, wide.without(remembered, self._before(state))), TitansState(memory, cache.tensors)

    def _as_layer(
        self,
        x: Tensor,
        state: LayerState,
        documents: Documents | None,
        probe: dict[str, Tensor] | None,
        persistent: Tensor,
    ) -> tuple[Tensor, TitansState]:
        """Let attention read the memory's answers, also those to persistent tokens."""
        wide, (remembered, memory) = self._remember(x, state, documents, probe, persistent)
        inner = sum_over_ranks(self.inner_proj(remembered.flatten(2)), self.mesh)
        y, (_, cache) = self.attention.answer(inner, self._inside(state, state.tensors.attention), wide.documents)
        if documents is not None and documents.begun is not None:
            # What persistent tokens and fillers have added differs from row to row.
            missing = self.tokens_in_sight(state.position + len(x)) - cache.k.shape[2]
            cache = AttentionCache(*(F.pad(part, (0, 0, missing, 0)).clone() for part in cache))
        return wide.without(y, self._before(state)), TitansState(memory, cache)

    def _remember(
        self,
        x: Tensor,
        state: LayerState,
        documents: Documents | None,
        probe: dict[str, Tensor] | None,
        persistent: Tensor,
    ) -> tuple[Prefixed, tuple[Tensor, MixerState]]:
        """Run the memory, over persistent tokens first where a sequence begins: all tokens, its answers, its state."""
        wide = Prefixed(x, None, None)
        if documents is not None:
            documents.first_of(x.shape[1], x.shape[0], state.position)
        if documents is not None or state.position == 0:
            wide = Prefixed.of(persistent, x, documents)
        now = self._inside(state, state.tensors.memory)
        answers, after = self.memory.answer(wide.tokens, now, wide.documents, probe)
        if probe is not None:
            values = by_token(probe, x.shape[1], self.memory.heads)
            probe |= statistics_of(wide.without(values, self._before(state)), [probe["state_norm"]])
        return wide, (answers, after.tensors)

    def tokens_in_sight(self, position: int) -> int:
        """Count the last tokens whose keys and values go on from a piece to the next, after so many tokens."""
        tokens = position + self.config.persistent_tokens * (self.config.composition == "mal")
        return min(tokens, self.config.window or tokens)

    def _inside(self, state: LayerState, tensors: MixerState | AttentionCache) -> LayerState:
        """Return the state of a part that has read the persistent tokens, if it has read anything."""
        return LayerState(state.position and state.position + self.config.persistent_tokens, tensors)

    def _before(self, state: LayerState) -> int:
        """Count the persistent tokens that a call reads first."""
        return 0 if state.position else self.config.persistent_tokens

    def _gated(self, seen: Tensor, remembered: Tensor) -> Tensor:
        """Gate attention's answers by the memory's `[T, B, H, D]`, which are normalised, by learned weights each."""
        return self.norm(seen).to(seen.dtype) * torch.sigmoid(remembered)
