"""Checks of activations that are computed again: where it would save nothing, it is not asked for."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins
from hopescale.config.execution import reverse_saves
from hopescale.config.model_shape import has_chunk_loop, head_dim, projection_chunk_size
from hopescale.config.schema import RunConfig


def reverse_saves_memory(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """States of memories are found again from what chunks wrote, if there are chunks, and that is less."""
    model, mixer, key = config.model, config.model.self_modifying, "train.recompute"
    if config.train.recompute != "reverse" or model.num_heads < 1:
        return
    if model.mixer != "self_modifying" or not has_chunk_loop(mixer):
        why = "stores static values" if model.mixer == "self_modifying" else f"is {model.mixer}"
        hint = "set it to none, memory or block"
        yield Problem(key, f"reverse has no effect: the mixer {why}, without a chunk loop", hint=hint)
        return
    size, tokens = "projection_chunk_size" if mixer.projection_chunk_size else "chunk_size", config.train.seq_len
    chunk = projection_chunk_size(model)
    if not reverse_saves(model):
        message = f"reverse has no effect: what {size} = {chunk} tokens write is not less than what they write to"
        hint = f"set it to chunks, or {size} well below the head dim, {head_dim(model)}"
        yield Problem(key, message, hint=hint)
    elif tokens <= chunk:
        message = f"reverse has no effect: train.seq_len = {tokens} is one chunk, {size} = {chunk}"
        yield Problem(key, message, hint="set it to chunks")


CHECKS: tuple[Check, ...] = (reverse_saves_memory,)
