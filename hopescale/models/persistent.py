"""Persistent tokens: learned tokens that are read before each document (Titans, arXiv 2501.00663, Eq. 19)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents


class Prefixed(NamedTuple):
    """Tokens with persistent ones before each document.

    Attributes:
        tokens: Both `[T', B, N]`.
        documents: Documents of these; None takes a sequence for one.
        places: Places in a row of all, of the tokens without persistent ones `[B * T]`; None has them last.
    """

    tokens: Tensor
    documents: Documents | None
    places: Tensor | None

    @classmethod
    def of(cls, persistent: Tensor, x: Tensor, documents: Documents | None) -> Prefixed:
        """Put persistent tokens `[P, N]` before each document of `x` `[T, B, N]` that begins there.

        Rows with fewer of them than others begin with zeros, which are a document of their own; in a row that begins
        with a document of an earlier piece, they lie behind that one. A piece has rows where documents begin, or none.
        """
        count, (tokens, batch, width) = len(persistent), x.shape
        if documents is None:
            return cls(torch.cat([persistent[:, None].expand(-1, batch, -1), x]), None, None)
        begun = documents.begun and tuple(before + count if before else 0 for before in documents.begun)
        if documents.begun and all(documents.before):
            # Persistent tokens get a gradient on every rank, also where it is zero.
            x = torch.cat([x, persistent[:, None].expand(-1, batch, -1)])[:tokens]
            return cls(x, documents._replace(first=documents.first - count, begun=begun), None)
        plan = _plan(documents, count)
        table = torch.cat([x.transpose(0, 1).reshape(-1, width), persistent, x.new_zeros(1, width)])
        sources = torch.full((plan.first.numel(),), len(table) - 1)
        starts = plan.starts[torch.tensor(documents.before) == 0]
        sources[starts[:, None] + torch.arange(count)] = torch.arange(count) + batch * tokens
        sources[plan.places] = torch.arange(batch * tokens)
        wide = table.index_select(0, to_device(sources, x.device)).unflatten(0, plan.first.shape).transpose(0, 1)
        parts = plan.first, torch.tensor(plan.bounds), plan.places
        first, bounds, places = (to_device(part, x.device) for part in parts)
        if begun:
            before = to_device(torch.tensor(begun, dtype=torch.int32), x.device)
            first = torch.where(first == 0, -before[:, None], first)
        return cls(wide, Documents(first, bounds, tuple(plan.bounds), begun), places)

    def without(self, y: Tensor, count: int) -> Tensor:
        """Return the rows of `y` `[T', B, ...]` that belong to ordinary tokens, given the number of persistent ones."""
        if self.places is None:
            return y[count:]
        rows = y.transpose(0, 1).flatten(0, 1).index_select(0, self.places)
        return rows.unflatten(0, (y.shape[1], -1)).transpose(0, 1)


class _Plan(NamedTuple):
    """Where documents lie with persistent tokens before each, in a row of all tokens.

    Attributes:
        first: Place in its row of the first token of each token's document `[B, T']`, as in `Documents`.
        bounds: Bounds of the documents, as in `Documents`.
        starts: Place of the first token of each document, persistent ones included.
        places: Place of each of the other tokens.
    """

    first: Tensor
    bounds: list[int]
    starts: Tensor
    places: Tensor


def _plan(documents: Documents, count: int) -> _Plan:
    """Lay out rows of one length, which end with their last document, given the number of persistent tokens."""
    tokens, bounds = documents.first.shape[1], torch.tensor(documents.bounds)
    begins, lengths, is_new = bounds[:-1], bounds.diff(), torch.tensor(documents.before) == 0
    row = begins // tokens
    in_row = row[is_new].bincount(minlength=len(documents.first))
    longest = tokens + count * int(in_row.max())
    # A row is filled up by as many persistent tokens as it has fewer documents than the longest one.
    earlier = is_new.cumsum(0) - is_new.int() - (in_row.cumsum(0) - in_row)[row]
    shift = torch.where(is_new, (in_row.max() - in_row[row] + earlier) * count, 0)
    starts = row * longest + shift + begins - row * tokens
    own = torch.where(is_new, count, 0)
    places = torch.arange(len(documents.first) * tokens) + (starts + own - begins).repeat_interleave(lengths)
    behind = (starts + lengths)[~is_new]
    edges = torch.cat([starts, behind, torch.arange(len(in_row) + 1) * longest]).unique()
    here = torch.arange(longest).expand(len(in_row), -1)
    is_first = torch.zeros(len(in_row) * longest, dtype=torch.bool)
    is_first[edges[:-1]] = True
    first = torch.where(is_first.view(here.shape), here, 0).cummax(dim=1).values.to(torch.int32)
    return _Plan(first, edges.tolist(), starts, places)
