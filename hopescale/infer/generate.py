"""Generation from a carried state: the context is read once, then each token costs the same however long it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.infer.sampling import Sampling, sample
from hopescale.models import Model, ModelState

PREFILL_TOKENS = 2048
"""Tokens read at once; bounds the memory of a long prompt."""


THREAD_WORK = 2**25
"""Parameters times tokens of a forward pass that keep one thread of the CPU busy for about 10 ms, at least a thread."""


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
def prefill(
    model: Model,
    tokens: Tensor,
    state: ModelState | None = None,
    on_read: Callable[[int], None] = lambda num_tokens: None,
) -> Reading:
    """Read a context `[B, T]`, `T >= 1`, from `state` on; report the number of tokens of each part to a listener."""
    for part in tokens.split(PREFILL_TOKENS, dim=1):
        with _threads_for(model, part):
            logits, state = model(part, state, last_only=True)
        on_read(part.shape[1])
    return Reading(logits[:, -1], state)


@contextmanager
def _threads_for(model: Model, tokens: Tensor) -> Iterator[None]:
    """Compute on no more threads of the CPU than have work: they wait for one another at each operation."""
    threads = fitting = torch.get_num_threads()
    if threads > 1 and not tokens.is_cuda:
        fitting = threads_with_work(model.num_params, tokens.numel(), threads)
    if fitting == threads:
        yield
        return
    torch.set_num_threads(fitting)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_with_work(num_params: int, num_tokens: int, most: int) -> int:
    """Return how many threads, at least 1 and at `most` so many, have work in a forward pass."""
    return max(1, min(most, num_params * num_tokens // THREAD_WORK))


def generate(
    model: Model,
    reading: Reading,
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    end: int | None = None,
) -> Iterator[GeneratedToken]:
    """Yield one token after the other, at most `max_tokens`, after a `prefill`. The last token is not read.

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
