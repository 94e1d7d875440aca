"""The code that a config asks for: the backend of its memories, and recomputation."""

from __future__ import annotations

from hopescale.config.model_shape import (
    bank_layers,
    has_chunk_loop,
    head_dim,
    memory_banks,
    memory_dim,
    projection_chunk_size,
)
from hopescale.config.schema import MixerConfig, ModelConfig, RunConfig, SelfModifyingConfig, TrainConfig
from hopescale.ops.backends import Backend, Choice, MemoryShape, Products, choose_products, select
from hopescale.ops.limits import is_trace_smaller

_USUAL: dict[str, Backend] = {"cuda": "triton", "cpu": "cpp"}
"""Code that runs all chunks in one operation, by device."""


def memory_shape(model: ModelConfig, mixer: SelfModifyingConfig) -> MemoryShape:
    """Return the facts that decide which code can run a mixer's memories."""
    sizes = (mixer.chunk_size, projection_chunk_size(mixer))
    return MemoryShape(head_dim(model), memory_dim(model, mixer), *sizes, has_chunk_loop(mixer))


def memory_backend(config: RunConfig, mixer: SelfModifyingConfig, device: str | None = None) -> Choice:
    """Choose the code that trains a mixer's memories on a type of device; None is any suitable device."""
    train = config.train
    how = {"compiled": train.compile, "recompute": train.recompute}
    return select(train.backend, memory_shape(config.model, mixer), device=device, **how)


def kernel_products(train: TrainConfig) -> Products:
    """Return the operands of products in Triton kernels, which are compiled for them."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[train.precision]
    return choose_products(train.kernel_precision, dtype)


def is_fused(config: RunConfig, mixer: MixerConfig) -> bool:
    """Tell whether one operation runs the chunks of memories that wait for one another, where a machine has it.

    The machine's device is that of `train.device`; for `auto` it is any.
    """
    train = config.train
    wanted = _USUAL.get(train.device, "auto") if train.backend == "auto" else train.backend
    how = {"compiled": train.compile, "recompute": train.recompute}
    return has_chunk_loop(mixer) and select(wanted, memory_shape(config.model, mixer), **how).backend in _USUAL.values()


def effective_recompute(config: RunConfig, mixer: MixerConfig) -> str:
    """Return the recomputation of a block in the words of `train.recompute`: operations over all chunks imply `chunks`.

    Only memories know `chunks` and `reverse`.
    """
    wanted = config.train.recompute
    if not has_chunk_loop(mixer):
        return "none" if wanted in ("chunks", "reverse") else wanted
    return "chunks" if wanted == "none" and is_fused(config, mixer) else wanted


def reverse_saves(model: ModelConfig, mixer: MixerConfig) -> bool:
    """Tell whether `train.recompute: reverse` keeps less than `chunks`."""
    if not has_chunk_loop(mixer):
        return False
    layers = bank_layers(model, mixer, list(memory_banks(mixer).values())[-1])[:2]
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    tokens = projection_chunk_size(mixer)
    return any(count and is_trace_smaller(tokens, width, out, **rule) for width, out, count in layers)


def run_again(config: RunConfig) -> float:
    """Return the part of the tokens whose pieces of sequences run forward once more in the backward pass."""
    return 1 - 1 / config.train.segments
