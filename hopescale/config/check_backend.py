"""Checks of what computes memories: `train.backend` and `train.compile` must have something to do."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins
from hopescale.config.execution import memory_backend
from hopescale.config.model_shape import has_chunk_loop
from hopescale.config.schema import RunConfig


def compile_needs_a_chunk_loop(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Only the chunk loop of memories is compiled."""
    model = config.model
    if not config.train.compile or (model.mixer == "self_modifying" and has_chunk_loop(model.self_modifying)):
        return
    why = "stores static values" if model.mixer == "self_modifying" else f"is {model.mixer}"
    yield Problem("train.compile", f"true has no effect: the mixer {why}, without a chunk loop", hint="leave it false")


def backend_needs_memories(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Attention has one implementation."""
    if config.train.backend != "auto" and config.model.mixer != "self_modifying":
        message = f"{config.train.backend} has no effect: the mixer is {config.model.mixer}"
        yield Problem("train.backend", message, hint="leave it at auto")


def backend_knows_these_memories(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A backend that is asked for must be able to run the memories, on a machine that has what it takes."""
    if config.model.mixer != "self_modifying" or config.model.num_heads < 1:
        return
    choice = memory_backend(config)
    if choice.backend is None:
        yield Problem("train.backend", f"{config.train.backend} cannot run: {choice.reason}", hint="leave it at auto")


CHECKS: tuple[Check, ...] = (compile_needs_a_chunk_loop, backend_needs_memories, backend_knows_these_memories)
