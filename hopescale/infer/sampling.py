"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hopescale.common.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Number of likeliest tokens to choose from; None keeps all.
        top_p: Keep only the likeliest tokens that together reach this probability (arXiv 1904.09751); None keeps all.

    Raises:
        ConfigError: If a value is out of range, or has no effect because the temperature is 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.temperature}, but must be 0 (greedy) or a number above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p is {self.top_p}, but must be in (0, 1]")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("--top-k and --top-p have no effect at --temperature 0", "set --temperature, e.g. 0.8")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose one token per row of logits `[B, V]`: ids `[B]`, int64. The generator is on the CPU."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.double().cpu()
    scaled = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        smallest = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
