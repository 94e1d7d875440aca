"""Titans' compositions: their attention, and problems of their settings."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.model_shape import head_dim
from hopescale.config.schema import AttentionConfig, ModelConfig
from hopescale.config.schema.titans import TitansConfig


def titans_attention(mixer: TitansConfig) -> AttentionConfig:
    """Return the attention of a composition as a mixer of its own."""
    return AttentionConfig(window=mixer.window)


def titans_problems(model: ModelConfig, mixer: TitansConfig, key: str) -> Iterator[Problem]:
    """Find settings that do not fit together, or have no effect; `key` is the dotted key of the mixer's section."""
    if head_dim(model) % 2:
        yield Problem("model.head_dim", f"{key} rotates pairs of channels, but the head dim is {head_dim(model)}")
    if mixer.adaptive or mixer.query != "static":
        message = f"titans has static maps: adaptive is {list(mixer.adaptive)}, query {mixer.query}"
        yield Problem(f"{key}.adaptive", message, hint="leave both out, or set kind to self_modifying")
    if mixer.reset_every is not None:
        message = f"{mixer.reset_every}: the memories of titans do not start anew, as no attention would reach back"
        yield Problem(f"{key}.reset_every", message, hint="leave it null, or set kind to self_modifying")
    if mixer.far is not None:
        message = "the compositions of titans have one memory: attention carries what a far one would"
        yield Problem(f"{key}.far", message, hint="leave it null, or set kind to self_modifying")
    if mixer.gate and mixer.composition != "mal":
        message = f"true has no place in {mixer.composition}, where the memory is the gate"
        yield Problem(f"{key}.gate", message, hint="leave it false")
    if mixer.window is not None and mixer.composition == "mac":
        message = f"{mixer.window} has no effect: mac attends within segments of chunk_size = {mixer.chunk_size} tokens"
        yield Problem(f"{key}.window", message, hint="leave it null, or set chunk_size")
