"""Sizes of a mixer of test-time training that follow from its config, and problems of such a config."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.ttt import TttConfig


def ttt_hidden(model: ModelConfig, config: TttConfig) -> int | None:
    """Return the hidden width of MLP memories, None of linear ones."""
    return None if config.memory == "linear" else config.memory_dim or 4 * head_dim(model)


def ttt_slices(config: TttConfig) -> int:
    """Count the in-projection's slices of a head's width: keys and queries, shared or not, values, output gates."""
    return (2 if config.conv_width else 3) + config.gate


def ttt_parts(model: ModelConfig, config: TttConfig) -> tuple[tuple[int, int], ...]:
    """Return the projections in a head's rows of the in-projection, the last of which makes the learning rate."""
    return *[(1, head_dim(model))] * ttt_slices(config), (1, 1)


def ttt_problems(model: ModelConfig, config: TttConfig, key: str) -> Iterator[Problem]:
    """Find settings that do not fit together, or have no effect.

    Args:
        model: Sizes that the mixer takes over.
        config: Settings of the mixer.
        key: Dotted key of its section.
    """
    if head_dim(model) % 2:
        yield Problem("model.head_dim", f"{key} rotates pairs of channels, but the head dim is {head_dim(model)}")
    if config.memory_dim is not None and config.memory == "linear":
        message = f"{config.memory_dim} has no effect: memory is linear"
        yield Problem(f"{key}.memory_dim", message, hint="leave it null, or set memory to mlp")
