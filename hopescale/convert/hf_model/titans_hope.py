"""Titans: a memory composed with attention and persistent tokens (arXiv 2501.00663, section 4)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_hope import HopeAttention
from .columns_hope import Columns, Norm, RowPosition, State, choose, mix_groups, to_unit
from .memory_hope import HopeSelfModifying

MEMORY = "memory/"  # what names in a state begin with that are the memory's


class HopeContext(nn.Module):
    """Answers of the memory to the tokens of a segment, before attention reads them (Eq. 21)."""

    def __init__(self, model: SimpleNamespace, dim: int):
        super().__init__()
        self.heads, self.dim = model.num_heads, dim
        self.query_proj = nn.Linear(model.d_model, self.heads * dim, bias=False)
        self.norm = Norm(self.heads, dim, eps=model.norm_eps)
        self.out_proj = nn.Linear(self.heads * dim, model.d_model, bias=False)


class HopeTitans(nn.Module):
    """Memory as a context (`mac`), as a gate (`mag`) or as a layer (`mal`)."""

    def __init__(self, model: SimpleNamespace, config: SimpleNamespace, dim: int):
        super().__init__()
        self.config, self.heads, self.dim = config, model.num_heads, dim
        width = self.heads * dim
        self.persistent = nn.Parameter(torch.zeros(config.persistent_tokens, model.d_model))
        plain = {
            "num_kv_heads": None,
            "qkv_bias": False,
            "qk_norm": False,
            "rope_theta": 10_000.0,
            "rope_scaling": None,
        }
        attention = SimpleNamespace(window=config.window, **plain)
        self.memory = HopeSelfModifying(model, config, dim, is_whole=False)
        self.attention = HopeAttention(model, attention, dim, is_whole=False)
        if config.composition == "mac":
            self.context = HopeContext(model, dim)
        if config.composition != "mag":
            self.inner_proj = nn.Linear(width, model.d_model, bias=False)
        if config.composition != "mal":
            self.norm = Norm(self.heads, dim, eps=model.norm_eps)
        self.out_proj = nn.Linear(width, model.d_model, bias=False)

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; padding neither moves the memory nor is seen."""
        run = {"mac": self._as_context, "mag": self._as_gate, "mal": self._as_layer}[self.config.composition]
        y, state = run(x, state, columns)
        return self.out_proj(y), state

    def _first(self, x: Tensor) -> Tensor:
        """Return the persistent tokens as a sequence `[1, P, N]`."""
        return self.persistent.to(x.dtype)[None]

    def _remember(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Run the memory over tokens, which follow the persistent ones: its answers `[B, T, H * D]`, its state."""
        run = self.memory.answer
        before = len(self.persistent) if self.config.composition != "mac" else 0
        columns = columns._replace(position=columns.position + before)
        return mix_groups(run, x, state, columns, self.heads * self.dim)

    def _begin(self, x: Tensor) -> tuple[Tensor, State]:
        """Let the memory read the persistent tokens: its answers `[1, P, H * D]`, and its state for each row of `x`."""
        first = self._first(x)
        y, state = self.memory.answer(first, self.memory.initial_state(1), RowPosition([0]))
        return y, {name: tensor.expand(len(x), *tensor.shape[1:]) for name, tensor in state.items()}

    def _as_gate(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Let the memory gate attention's answers; persistent tokens stay in attention's sight (Eq. 26-28)."""
        memory, cache = _parted(state) if state else (self._begin(x)[1], {})
        remembered, memory = self._remember(x, memory, columns)
        first = self._first(x)
        _, *ahead = self.attention.project(first, torch.arange(first.shape[1], device=x.device)[None])
        seen, cache = self.attention.answer(x, cache, columns.real, columns.padded, ahead)
        return self._gated(seen, remembered), _joined(memory, cache)

    def _as_layer(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Let attention read the memory's answers, also those to persistent tokens (Eq. 29-31)."""
        count, rows = len(self.persistent), len(x)
        if state:
            memory, cache = _parted(state)
        else:
            answers, memory = self._begin(x)
            _, k, v = self.attention.project(self.inner_proj(answers), torch.arange(count, device=x.device)[None])
            cache = {"k": k.expand(rows, -1, -1, -1), "v": v.expand(rows, -1, -1, -1)}
        remembered, memory = self._remember(x, memory, columns)
        real = F.pad(columns.real, (count, 0), value=True)
        y, cache = self.attention.answer(self.inner_proj(remembered), cache, real, columns.padded)
        return y, _joined(memory, cache)

    def _as_context(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Let attention read each segment with what the memory knew before it; write what it answers (Eq. 21-25)."""
        if not state:
            empty = x.new_zeros(len(x), self.heads, self.config.chunk_size, self.dim)
            cache = dict.fromkeys(("k", "v", "context_k", "context_v"), empty)
            state = _joined(self.memory.initial_state(len(x)), cache)
        return mix_groups(self._segments, x, state, columns, self.heads * self.dim)

    def _segments(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        """Run segments of `chunk_size` tokens; of more than one token, all rows stand at the same place of one."""
        outputs, read, size = [], 0, self.config.chunk_size
        while read < x.shape[1]:
            stop = min(x.shape[1], read + size - (position.counts[0] + read) % size)
            y, state = self._segment(x[:, read:stop], state, position + read)
            outputs.append(y)
            read = stop
        return torch.cat(outputs, dim=1), state

    def _segment(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        """Run a segment, or a part of one; a token sees what was retrieved for it and for those before it."""
        memory, cache = _parted(state)
        size, count = self.config.chunk_size, len(self.persistent)
        places = position.tensor(x.device)[:, None] % size + torch.arange(x.shape[1], device=x.device)  # [B, T]
        context = self._retrieved(x, memory, position.begins(size, x.device))
        (_, *context), (q, *own) = (
            self.attention.project(tokens, places + count + before) for tokens, before in ((context, 0), (x, size))
        )
        index = places[:, None, :, None].expand(own[0].shape)
        now = zip(("context_k", "context_v", "k", "v"), (*context, *own), strict=True)
        cache = {name: cache[name].to(tensor.dtype).scatter(2, index, tensor) for name, tensor in now}
        first = self._first(x)
        _, *ahead = self.attention.project(first, torch.arange(count, device=x.device)[None])
        k, v = (
            torch.cat([one.expand(len(x), -1, -1, -1), cache[f"context_{name}"], cache[name]], dim=2)
            for name, one in zip("kv", ahead, strict=True)
        )
        seen = (torch.arange(size, device=x.device) <= places[..., None])[:, None]  # [B, 1, T, size]
        seen = self.attention.read(q, k, v, F.pad(seen.repeat(1, 1, 1, 2), (count, 0), value=True))
        remembered, memory = self.memory.answer(self.inner_proj(seen), memory, position)
        return self._gated(seen, remembered), _joined(memory, cache)

    def _retrieved(self, x: Tensor, memory: State, begins: Tensor | bool) -> Tensor:
        """Ask the memory as it was before the segment for all tokens `[B, T, N]`."""
        running, boundary = (self.memory.weights(memory, kind, "mem") for kind in ("", "boundary/"))
        known = {name: choose(begins, running[name], boundary[name]) for name in running}
        q = self.context.query_proj(x).unflatten(-1, (self.heads, self.dim)).transpose(1, 2).float()
        with torch.autocast(x.device.type, enabled=False):
            answers = self.memory.memories["mem"].retrieve(known, to_unit(q))
        return self.context.out_proj(self.context.norm(answers.transpose(1, 2)).to(x.dtype).flatten(2))

    def _gated(self, seen: Tensor, remembered: Tensor) -> Tensor:
        """Gate attention's answers, which are normalised, by the memory's `[B, T, H * D]`."""
        normed = self.norm(seen.unflatten(-1, (self.heads, self.dim))).to(seen.dtype)
        return normed.flatten(2) * torch.sigmoid(remembered)


def _joined(memory: State, cache: State) -> State:
    return {f"{MEMORY}{name}": tensor for name, tensor in memory.items()} | cache


def _parted(state: State) -> tuple[State, State]:
    """Undo `_joined`."""
    memory = {name.removeprefix(MEMORY): tensor for name, tensor in state.items() if name.startswith(MEMORY)}
    return memory, {name: tensor for name, tensor in state.items() if not name.startswith(MEMORY)}
