"""Titans' memory as a context: the tokens that attention reads of it, and the order of segments (MAC, Eq. 21-25)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.models.attention import AttentionCache
from hopescale.models.norm import RMSNorm
from hopescale.models.self_modifying import MixerState
from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents
from hopescale.ops.norm import l2_norm
from hopescale.ops.self_modifying import MemorySpec, Weights
from hopescale.ops.self_modifying.memories import retrieve
from hopescale.parallel.layers import ColumnLinear, RowLinear
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import sum_over_ranks


class Context(nn.Module):
    """Tokens that the memory answers to a segment, `h = M*(S W_Q)` (Eq. 21)."""

    def __init__(self, model: ModelConfig, *, mesh: Mesh):
        super().__init__()
        self.mesh, self.dim = mesh, head_dim(model)
        self.heads, width = model.num_heads // mesh.tp_group.size(), model.num_heads * self.dim
        how = {"std": model.d_model**-0.5, "shared_input": True}
        self.query_proj = ColumnLinear(model.d_model, width, mesh=mesh, **how)
        self.norm = RMSNorm(self.heads, self.dim, eps=model.norm_eps, partition_dim=0)
        self.out_proj = RowLinear(width, model.d_model, std=width**-0.5, mesh=mesh, partial=True)

    def forward(self, x: Tensor, spec: MemorySpec, weights: Weights) -> Tensor:
        """Ask memories with these weights for all tokens `x`; returns tokens `[T, B, N]`, whole on every rank."""
        q = self.query_proj(x).unflatten(-1, (self.heads, self.dim)).permute(1, 2, 0, 3)  # [B, H, T, D]
        q = l2_norm(q.to(torch.promote_types(q.dtype, torch.float32)))
        answers = retrieve(spec, weights, {"mem": q}, q)["mem"].permute(2, 0, 1, 3)
        return sum_over_ranks(self.out_proj(self.norm(answers).to(x.dtype).flatten(2)), self.mesh)


class ContextState(NamedTuple):
    """State of the memory, and keys and values of the present segment: of its tokens, and of the retrieved ones.

    After a piece of documents it is the state after their last whole segment, and `ahead` are the last tokens
    `[B, L, N]`, those of the segment that is not at its end among them; else None.
    """

    memory: MixerState
    attention: AttentionCache
    context: AttentionCache
    ahead: Tensor | None = None

    def rows(self, rows: slice) -> ContextState:
        """Return the state of some sequences."""
        return tree_map(lambda x: None if x is None else x[rows], self)


RunSegment = Callable[[Tensor, ContextState, int], tuple[Tensor, Tensor | None, ContextState]]
"""Runs a segment, or a part of one, of tokens `[T, B, N]` that follow that many others in each sequence.

Returns answers, what is known of each token `[T, B, ...]`, or None, and the next state.
"""


def run_segments(
    run: RunSegment, x: Tensor, state: ContextState, position: int, size: int
) -> tuple[Tensor, Tensor | None, ContextState]:
    """Run sequences segment after segment; these begin at multiples of `size`. Returns what `run` does, of all."""
    tokens = len(x)
    first = min(tokens, size - position % size)
    rest = tokens - first
    answers, known = [], []
    for part in x.split([first, *[size] * (rest // size), *[rest % size] * (rest % size > 0)]):
        y, values, state = run(part, state, position)
        answers.append(y)
        known.append(values)
        position += len(part)
    return torch.cat(answers), None if known[0] is None else torch.cat(known), state


def run_documents(
    run: RunSegment,
    x: Tensor,
    fresh: Callable[[int], ContextState],
    documents: Documents,
    size: int,
    before: ContextState | None,
) -> tuple[Tensor, Tensor | None, ContextState]:
    """Run the documents of packed sequences side by side, segment after segment; one that has none left drops out.

    What fills up a document's last segment comes after all that the document reads. The last document of a sequence is
    not filled up, so that the memory returned is that after its last token; keys and values of a segment that it has
    begun are not returned. Of a piece, what is returned is the state after the last whole segment, and the next piece
    runs the tokens behind it again.

    Args:
        run: Function that runs a segment.
        x: Tokens of the packed sequences `[T, B, N]`.
        fresh: Function that returns the state of a number of sequences before their first token.
        documents: Documents in the sequences.
        size: Tokens of a segment.
        before: State that the piece before has handed on; None for sequences that begin.

    Returns:
        What `run` does, of these tokens alone.
    """
    is_piece, (_, batch, width) = documents.begun is not None, x.shape
    if is_piece:
        ahead = x.new_zeros(batch, size - 1, width) if before is None else before.ahead.to(x.dtype)
        x = torch.cat([ahead.transpose(0, 1), x])
    begins, ends, wanted = documents.in_longer_rows(len(x), size)
    last = set(documents.last)
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    counts = [length // size if n in last else -(-length // size) for n, length in enumerate(lengths)]
    order = sorted(range(len(counts)), key=lambda n: -counts[n])
    table = torch.cat([x.transpose(0, 1).flatten(0, 1), x.new_zeros(1, width)])
    ended: dict[int, ContextState] = {}
    answers: list[tuple[Tensor, Tensor | None]] = []
    places: list[Tensor] = []

    def begun(numbers: list[int]) -> ContextState:
        """Return the states that documents begin with."""
        if before is None:
            return fresh(len(numbers))
        index, known = to_device(torch.tensor(documents.states(numbers)), x.device), before._replace(ahead=None)
        return tree_map(lambda a, b: None if a is None else torch.cat([a, b]).index_select(0, index), fresh(1), known)

    def step(numbers: list[int], begin: int, tokens: int, state: ContextState) -> ContextState:
        starts, stops = (torch.tensor([of[n] for n in numbers]) for of in (begins, ends))
        index = starts[:, None] + torch.arange(begin, begin + tokens)
        index = torch.where(index < stops[:, None], index, len(table) - 1)
        part = table.index_select(0, to_device(index.flatten(), x.device)).unflatten(0, index.shape).transpose(0, 1)
        *parts, state = run(part, state, begin)
        answers.append(tuple(None if one is None else one.transpose(0, 1).flatten(0, 1) for one in parts))
        places.append(index.flatten())
        return state

    alive = [n for n in order if counts[n]]
    state, done = begun(alive) if alive else None, 0
    while alive:
        state, done = step(alive, done * size, size, state), done + 1
        going = sum(counts[n] > done for n in alive)
        ended |= {n: state.rows(slice(row, row + 1)) for row, n in enumerate(alive) if row >= going and n in last}
        alive, state = alive[:going], state.rows(slice(going))
    for n in documents.last:
        ended[n] = state = ended.get(n) or begun([n])
        if rest := lengths[n] % size:
            state = step([n], lengths[n] - rest, rest, state)
        ended[n] = ended[n] if is_piece else state
        ended[n] = ended[n]._replace(attention=fresh(1).attention, context=fresh(1).context)
    after = [ended[n] for n in documents.last]
    y, values = _in_order(answers, torch.cat(places), len(table), wanted, documents)
    state = tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *after)
    state = state._replace(ahead=x[len(x) - size + 1 :].transpose(0, 1).clone() if is_piece else None)
    return y, values, state


def _in_order(
    results: list[tuple[Tensor | None, ...]], places: Tensor, count: int, wanted: Tensor, documents: Documents
) -> Iterator[Tensor | None]:
    """Yield what steps have returned, of tokens at these places in a row of `count`, for those `wanted`."""
    found = torch.empty(count, dtype=torch.int64)
    found[places] = torch.arange(len(places))
    found = to_device(found[wanted], documents.first.device)
    for parts in zip(*results, strict=True):
        if parts[0] is None:
            yield None
        else:
            yield torch.cat(parts).index_select(0, found).unflatten(0, documents.first.shape).transpose(0, 1)
