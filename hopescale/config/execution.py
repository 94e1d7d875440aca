"""Which code a config asks for: what runs its memories, and what is recomputed."""

from __future__ import annotations

from hopescale.config.model_shape import (
    bank_layers,
    has_chunk_loop,
    head_dim,
    memory_banks,
    memory_dim,
    projection_chunk_size,
)
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.ops.backends import Choice, MemoryShape, select
from hopescale.ops.limits import is_trace_smaller


def memory_shape(model: ModelConfig) -> MemoryShape:
    """Return the facts that decide which code can run a model's memories."""
    mixer = model.self_modifying
    sizes = (mixer.chunk_size, mixer.projection_chunk_size or mixer.chunk_size)
    return MemoryShape(head_dim(model), memory_dim(model), *sizes, has_chunk_loop(model))


def memory_backend(config: RunConfig, device: str | None = None) -> Choice:
    """Choose the code that trains a model's memories on a type of device; None is any that has what it takes."""
    train = config.train
    how = {"compiled": train.compile, "recompute": train.recompute}
    return select(train.backend, memory_shape(config.model), device=device, **how)


def is_fused(config: RunConfig) -> bool:
    """Tell whether one operation runs the chunks of memories that wait for one another, where a machine has it."""
    return has_chunk_loop(config.model) and memory_backend(config).backend in ("cpp", "triton")


def effective_recompute(config: RunConfig) -> str:
    """Return what is computed again, as `train.recompute` says it: operations that run all chunks always do these."""
    return "chunks" if config.train.recompute == "none" and is_fused(config) else config.train.recompute


def reverse_saves(model: ModelConfig) -> bool:
    """Tell whether `train.recompute: reverse` keeps less than `chunks`."""
    mixer = model.self_modifying
    if not has_chunk_loop(model):
        return False
    layers = bank_layers(model, list(memory_banks(model).values())[-1])[:2]
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    tokens = projection_chunk_size(model)
    return any(count and is_trace_smaller(tokens, width, out, **rule) for width, out, count in layers)
