"""Where documents begin in packed sequences, found once for all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hopescale.ops.device import to_device


class Documents(NamedTuple):
    """Documents in packed sequences: runs of tokens that belong together, each within one sequence.

    Those of the first sequence come first. With the tokens of all sequences in one row `[B * T]`, document `n` has the
    tokens from `bounds[n]` up to `bounds[n + 1]` (`cu_seqlens` of FlashAttention and FLA). Where the tokens are pieces
    of longer sequences, the first document of each may have begun in an earlier piece.

    Attributes:
        first: Place in its sequence of the first token of each token's document `[B, T]`, int32; an id, too. It is
            negative where the document began in an earlier piece.
        offsets: The bounds on the tokens' device `[N + 1]`, int64.
        bounds: The bounds as numbers.
        begun: Tokens of the first document of each sequence in earlier pieces; None where sequences are whole.
    """

    first: Tensor
    offsets: Tensor
    bounds: tuple[int, ...]
    begun: tuple[int, ...] | None = None

    @classmethod
    def of(cls, document_ids: Tensor, device: torch.device | None = None, begun: Tensor | None = None) -> Documents:
        """Find the documents of tokens with these ids `[B, T]` on the host; ids on a device are waited for.

        Wherever the id changes along a sequence, a document begins.

        Args:
            document_ids: Document of each token.
            device: Device of the tokens; None is that of the ids.
            begun: Attribute `begun` as a column `[B, 1]`, on the host.
        """
        ids, device = document_ids.cpu().numpy(), device or document_ids.device
        places = np.arange(ids.shape[1], dtype=np.int32)
        begins = beginnings(ids)
        first = np.maximum.accumulate(np.where(begins, places, 0).astype(np.int32), axis=1)
        if begun is not None:
            first = np.where(first == 0, -begun.numpy().astype(np.int32), first)
        bounds = np.append(np.flatnonzero(begins), ids.size)
        first, offsets = (to_device(torch.from_numpy(part), device) for part in (first, bounds))
        before = None if begun is None else tuple(begun.numpy()[:, 0].tolist())
        return cls(first, offsets, tuple(bounds.tolist()), before)

    @classmethod
    def whole(cls, batch: int, tokens: int, device: torch.device) -> Documents:
        """Take each of `batch` sequences of `tokens` tokens for one document."""
        bounds = range(0, batch * tokens + 1, tokens)
        first = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        return cls(first, torch.arange(bounds.start, bounds.stop, bounds.step, device=device), tuple(bounds))

    @classmethod
    def in_a_row(cls, lengths: Sequence[int], device: torch.device) -> Documents:
        """Return documents of these lengths in one sequence."""
        bounds = np.cumsum([0, *lengths])
        first = np.repeat(bounds[:-1], lengths).astype(np.int32)[None]
        first, offsets = (to_device(torch.from_numpy(part), device) for part in (first, bounds))
        return cls(first, offsets, tuple(bounds.tolist()))

    def cut(self, size: int) -> Documents:
        """Return pieces of the documents as documents: each of `size` tokens, the last ones of the rest."""
        begun = None if self.begun is None else tuple(before % size for before in self.begun)
        pairs = zip(self.bounds, self.bounds[1:], self._replace(begun=begun).before, strict=False)
        bounds = [max(begin, place) for begin, end, before in pairs for place in range(begin - before, end, size)]
        bounds.append(self.bounds[-1])
        places = torch.arange(self.first.shape[1], dtype=torch.int32, device=self.first.device)
        first = places - (places - self.first) % size
        return Documents(first, to_device(torch.tensor(bounds), self.offsets.device), tuple(bounds), begun)

    def in_longer_rows(self, row: int, size: int) -> tuple[list[int], list[int], Tensor]:
        """Find documents in rows of `row` tokens that end with these ones, and begin with others of earlier pieces.

        Returns:
            Places, in a row of all, where documents begin and end: one that has begun in an earlier piece begins with
            the chunk of `size` tokens that it is in. And the places of these tokens, on the host.
        """
        tokens, places = self.first.shape[1], torch.arange(self.bounds[-1])
        more, starts = row - tokens, zip(self.bounds, self.before, strict=False)
        begins = [begin + (begin // tokens + 1) * more - before % size for begin, before in starts]
        ends = [end + ((end - 1) // tokens + 1) * more for end in self.bounds[1:]]
        return begins, ends, places + (places // tokens + 1) * more

    def states(self, numbers: Iterable[int]) -> list[int]:
        """Return the place of the state that documents begin with, among a fresh one and those of an earlier piece."""
        tokens, before = self.first.shape[1], self.before
        return [self.bounds[n] // tokens + 1 if before[n] else 0 for n in numbers]

    def rows(self, rows: list[int]) -> Documents:
        """Return the documents of some sequences."""
        tokens, bounds = self.first.shape[1], []
        for place, row in enumerate(rows):
            in_row = (begin - row * tokens for begin in self.bounds[:-1] if begin // tokens == row)
            bounds += [place * tokens + begin for begin in in_row]
        bounds.append(len(rows) * tokens)
        index, offsets = (to_device(torch.tensor(part), self.first.device) for part in (rows, bounds))
        begun = None if self.begun is None else tuple(self.begun[row] for row in rows)
        return Documents(self.first[index], offsets, tuple(bounds), begun)

    def first_of(self, batch: int, tokens: int, position: int) -> Tensor:
        """Return `first` for a call that reads these tokens.

        Raises:
            ValueError: If `position` tokens came before, whose documents are unknown, if none came before, but
                documents go on, or if the documents are not those of the tokens.
        """
        if position and self.begun is None:
            raise ValueError("documents are given, but the documents of the tokens in the state are unknown")
        if not position and any(self.begun or ()):
            raise ValueError("documents go on from an earlier piece, but there is no state of it")
        if self.first.shape != (batch, tokens):
            raise ValueError(f"documents are of tokens {list(self.first.shape)}, but there are {[batch, tokens]}")
        return self.first

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def before(self) -> list[int]:
        """Tokens of each document in earlier pieces."""
        tokens, begun = self.first.shape[1], self.begun or (0,) * len(self.first)
        return [0 if begin % tokens else begun[begin // tokens] for begin in self.bounds[:-1]]

    @property
    def last(self) -> list[int]:
        """Number of the last document of each sequence."""
        tokens = self.first.shape[1]
        return [number for number, end in enumerate(self.bounds[1:]) if end % tokens == 0]


def beginnings(ids: np.ndarray) -> np.ndarray:
    """Return where documents with these ids `[B, T]` begin."""
    begins = np.ones(ids.shape, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins
