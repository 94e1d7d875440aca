"""Where documents begin in packed sequences, found once for all layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hopescale.ops.device import to_device


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
    def of(cls, document_ids: Tensor, device: torch.device | None = None) -> Documents:
        """Find the documents of tokens with these ids `[B, T]` on the host; ids on a device are waited for.

        Wherever the id changes along a sequence, a document begins.

        Args:
            document_ids: Document of each token.
            device: Device of the tokens; None is that of the ids.
        """
        ids, device = document_ids.cpu().numpy(), device or document_ids.device
        begins = np.ones(ids.shape, dtype=bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        places = np.arange(ids.shape[1], dtype=np.int32)
        first = np.maximum.accumulate(np.where(begins, places, 0).astype(np.int32), axis=1)
        bounds = np.append(np.flatnonzero(begins), ids.size)
        first, offsets = (to_device(torch.from_numpy(part), device) for part in (first, bounds))
        return cls(first, offsets, tuple(bounds.tolist()))

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
        return Documents(first, to_device(torch.tensor(bounds), self.offsets.device), tuple(bounds))

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
