"""Where documents begin in packed sequences, found once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Documents in packed sequences: runs of tokens that belong together, each within one sequence.

    Those of the first sequence come first. With the tokens of all sequences in one row `[B * T]`, document `n` has the
    tokens from `bounds[n]` up to `bounds[n + 1]` (`cu_seqlens` of FlashAttention and FLA).

    Attributes:
        first: Place in its sequence of the first token of each token's document `[B, T]`, int32; an id, too.
        offsets: The bounds on the tokens' device `[N + 1]`, int64.
        bounds: The bounds as numbers.
    """

    first: Tensor
    offsets: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, document_ids: Tensor) -> Documents:
        """Find the documents of tokens with these ids `[B, T]`; it waits for the device.

        Wherever the id changes along a sequence, a document begins.
        """
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        places = torch.arange(begins.shape[1], dtype=torch.int32, device=begins.device)
        first = torch.where(begins, places, 0).cummax(dim=1).values.to(torch.int32)
        end = torch.tensor([begins.numel()], device=begins.device)
        offsets = torch.cat([begins.flatten().nonzero()[:, 0], end])
        return cls(first, offsets, tuple(offsets.tolist()))

    @classmethod
    def whole(cls, batch: int, tokens: int, device: torch.device) -> Documents:
        """Take each of `batch` sequences of `tokens` tokens for one document."""
        bounds = range(0, batch * tokens + 1, tokens)
        first = torch.zeros(batch, tokens, dtype=torch.int32, device=device)
        return cls(first, torch.arange(bounds.start, bounds.stop, bounds.step, device=device), tuple(bounds))

    def cut(self, size: int) -> Documents:
        """Return pieces of the documents as documents: each of `size` tokens, the last ones of the rest."""
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        bounds = [place for begin, end in pairs for place in range(begin, end, size)] + [self.bounds[-1]]
        places = torch.arange(self.first.shape[1], dtype=torch.int32, device=self.first.device)
        first = places - (places - self.first) % size
        return Documents(first, torch.tensor(bounds, device=self.offsets.device), tuple(bounds))

    def first_of(self, batch: int, tokens: int, position: int) -> Tensor:
        """Return `first` for a call that reads these tokens.

        Raises:
            ValueError: If `position` tokens came before, whose documents are unknown, or if the documents are not those
                of the tokens.
        """
        if position:
            raise ValueError("documents are given, but the documents of the tokens in the state are unknown")
        if self.first.shape != (batch, tokens):
            raise ValueError(f"documents are of tokens {list(self.first.shape)}, but there are {[batch, tokens]}")
        return self.first

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def last(self) -> list[int]:
        """Number of the last document of each sequence."""
        tokens = self.first.shape[1]
        return [number for number, end in enumerate(self.bounds[1:]) if end % tokens == 0]
