"""Which code a config asks for: whether one operation runs the chunks of memories, and what is recomputed."""

from __future__ import annotations

from hopescale.config.model_shape import has_chunk_loop, head_dim, memory_banks, memory_dim, projection_chunk_size
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.ops.limits import FUSED_MULTIPLE, is_trace_smaller


def fused_unsupported_reason(config: RunConfig, backend: str) -> str | None:
    """Return what keeps `cpp` or `triton` from running a model's chunks as one operation; None if nothing does."""
    model, train = config.model, config.train
    if not has_chunk_loop(model.self_modifying) and backend == "triton":
        return None
    if train.compile:
        return "train.compile takes the chunk loop"
    if train.recompute == "reverse":
        return "train.recompute: reverse takes the chunk loop"
    if projection_chunk_size(model) != model.self_modifying.chunk_size:
        mixer = model.self_modifying
        return f"projection_chunk_size is {mixer.projection_chunk_size}, chunk_size {mixer.chunk_size}"
    if backend == "triton":
        return None
    widths = {"heads": head_dim(model), "memories": memory_dim(model) or FUSED_MULTIPLE}
    odd = [f"{name} are {width} wide" for name, width in widths.items() if width % FUSED_MULTIPLE]
    return f"{' and '.join(odd)}, not a multiple of {FUSED_MULTIPLE}" if odd else None


def is_fused(config: RunConfig) -> bool:
    """Tell whether one operation runs the chunks of memories that wait for one another, where a machine has it."""
    model, backend = config.model, config.train.backend
    if model.mixer != "self_modifying" or not has_chunk_loop(model.self_modifying) or backend == "torch":
        return False
    return fused_unsupported_reason(config, "cpp") is None


def effective_recompute(config: RunConfig) -> str:
    """Return what is computed again, as `train.recompute` says it: operations that run all chunks always do these."""
    return "chunks" if config.train.recompute == "none" and is_fused(config) else config.train.recompute


def reverse_saves(model: ModelConfig) -> bool:
    """Tell whether `train.recompute: reverse` keeps less than `chunks`."""
    mixer = model.self_modifying
    if model.mixer != "self_modifying" or not has_chunk_loop(mixer):
        return False
    names = list(memory_banks(model).values())[-1]
    narrow, dim, hidden = len({"eta", "alpha"} & set(names)), head_dim(model), memory_dim(model)
    layers = [(dim, (len(names) - narrow) * (hidden or dim) + narrow * (hidden or 1))]
    if hidden is not None and len(names) > narrow:
        layers.append((hidden, dim))
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    return any(is_trace_smaller(projection_chunk_size(model), *layer, **rule) for layer in layers)
