"""Generation from a carried state: the context is read once, then each token costs the same however long it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.infer.sampling import Sampling, sample
from hopescale.models import Model, ModelState

PREFILL_TOKENS = 2048
"""Tokens read at once; bounds the memory of a long prompt."""


class Reading(NamedTuple):
    """Where a model stands after all it has read."""

    logits: Tensor
    """What it predicts next, `[B, V]`."""
    state: ModelState


@dataclass(frozen=True)
class GeneratedToken:
    """A generated token and the state that has not yet read it."""

    token: Tensor
    """Token ids `[B]`."""
    state: ModelState


@torch.no_grad()
def prefill(model: Model, tokens: Tensor, state: ModelState | None = None) -> Reading:
    """Read a context `[B, T]`, `T >= 1`, after what `state` has read."""
    for part in tokens.split(PREFILL_TOKENS, dim=1):
        logits, state = model(part, state, last_only=True)
    return Reading(logits[:, -1], state)


def generate(
    model: Model,
    reading: Reading,
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    end: int | None = None,
) -> Iterator[GeneratedToken]:
    """Yield one token after the other, at most `max_tokens`, after what `prefill` has read. The last is not read.

    The token `end` ends a single sequence, and is neither yielded nor read; None never ends.
    """
    token = None
    for _ in range(max_tokens):
        if token is not None:
            reading = prefill(model, token[:, None], reading.state)
        token = sample(reading.logits, sampling, generator)
        if end is not None and bool((token == end).all()):
            return
        yield GeneratedToken(token, reading.state)
