"""Tokens of an unfinished chunk, which the next piece of a sequence runs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.self_modifying import Streams


class Ahead(NamedTuple):
    """Inputs of keys and values of the last tokens before a piece `[B, H, L, D]`; their queries have been answered."""

    k: Tensor
    v: Tensor

    def before(self, streams: Streams, gates: Mapping[str, Callable[[Tensor], Tensor]]) -> Streams:
        """Put these tokens in front of those of a piece; `gates` return the logits of keys' inputs, by name."""

        def joined(name: str, x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([gates[name](self.k), x], dim=2)

        k, v = (torch.cat([mine.to(x), x], dim=2) for mine, x in zip(self, streams, strict=False))
        q = torch.cat([torch.zeros_like(self.k).to(streams.q), streams.q], dim=2)
        return Streams(k, v, q, *(joined(name, getattr(streams, name)) for name in ("eta", "alpha", "mu")))

    def after(self, streams: Streams) -> Ahead:
        """Return the last tokens of a piece in front of which these were put, in memory of their own."""
        last = streams.k.shape[2] - self.k.shape[2]
        return Ahead(streams.k[:, :, last:].clone(), streams.v[:, :, last:].clone())
