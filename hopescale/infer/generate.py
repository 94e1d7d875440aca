"""Generation from a carried state: the context is read once, then each token costs the same however long it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hopescale.infer.sampling import Sampling, sample
from hopescale.models import Model, ModelState

PREFILL_TOKENS = 2048
"""Tokens read at once; bounds the memory of a long prompt."""


@dataclass(frozen=True)
class Step:
    """A generated token and the state that has not yet read it."""

    token: Tensor
    """Token ids `[B]`."""
    state: ModelState


@torch.no_grad()
def prefill(model: Model, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """Read a context `[B, T]`, `T >= 1`; return the logits after its last token `[B, V]` and the state."""
    for part in tokens.split(PREFILL_TOKENS, dim=1):
        logits, state = model(part, state, last_only=True)
    return logits[:, -1], state


@torch.no_grad()
def generate(
    model: Model,
    tokens: Tensor,
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    end: int | None = None,
) -> Iterator[Step]:
    """Read a context, then yield one token after the other.

    Args:
        model: In whatever precision it is.
        tokens: Context `[B, T]`, `T >= 1`.
        max_tokens: Most tokens to yield.
        sampling: How they are chosen.
        generator: Source of randomness.
        end: Token that ends a single sequence; it is not yielded. None never ends.
    """
    state = None
    for _ in range(max_tokens):
        logits, state = prefill(model, tokens, state)
        token = sample(logits, sampling, generator)
        if end is not None and bool((token == end).all()):
            return
        yield Step(token, state)
        tokens = token[:, None]
