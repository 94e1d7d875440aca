"""Checks of what computes memories: `train.backend` and `train.compile` must have something to do."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins
from hopescale.config.execution import fused_unsupported_reason
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


def fused_chunks_know_these_memories(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """One operation runs all chunks if they are alike and nothing else is to run them."""
    backend, model = config.train.backend, config.model
    if backend not in ("cpp", "triton") or model.mixer != "self_modifying" or model.num_heads < 1:
        return
    if unsupported_reason := fused_unsupported_reason(config, backend):
        yield Problem("train.backend", f"{backend} cannot run: {unsupported_reason}", hint="leave it at auto")


CHECKS: tuple[Check, ...] = (compile_needs_a_chunk_loop, backend_needs_memories, fused_chunks_know_these_memories)
