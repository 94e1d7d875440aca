"""What follows from a config: counts the run needs that nobody sets. Written beside the config, never into it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hopescale.config.layout import Layout, smallest_layout
from hopescale.config.schema import LevelConfig, ModelConfig, RunConfig, SelfModifyingConfig

VOCAB_MULTIPLE = 128
"""The stored vocabulary is padded to a multiple of this, for fast kernels and even tensor-parallel shards."""


FUSED_MULTIPLE = 16
"""Heads and memories of such widths can be run by `train.backend: cpp`."""

REVERSE_PARTS = 16
"""With `train.recompute: reverse`, of so many chunks in a row the state is kept with which the first one starts."""


@dataclass(frozen=True)
class RunPlan:
    """Derived values of a run."""

    dp: int
    """Replicas that read different sequences of a step."""
    tp: int
    """Ranks that share each layer."""
    pp: int
    """Stages of the pipeline."""
    global_batch_size: int
    """Sequences per optimizer step."""
    grad_accumulation: int
    """Micro batches per optimizer step on each replica."""
    total_tokens: int
    """Tokens of the whole run."""
    total_sequences: int
    """Sequences of the whole run."""
    head_dim: int
    """Width of a head of the mixer."""
    memory_dim: int | None
    """Hidden width of an MLP memory; None for other memories and other mixers."""
    projection_chunk_size: int | None
    """Tokens between two boundaries of the projection memories; None for other mixers."""
    padded_vocab_size: int
    """Rows of the embedding."""

    def to_dict(self) -> dict[str, int | None]:
        """Return the values by name, for `plan.json`."""
        return asdict(self)


def make_plan(config: RunConfig, layout: Layout | None = None) -> RunPlan:
    """Derive the plan of a config that has passed its checks.

    Args:
        config: The config.
        layout: How ranks are shared out; None is the fewest ranks that run the config, one unless it sets degrees.
    """
    layout = layout or smallest_layout(config)
    train, model = config.train, config.model
    global_batch_size = train.global_batch_tokens // train.seq_len
    return RunPlan(
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        global_batch_size=global_batch_size,
        grad_accumulation=global_batch_size // (train.micro_batch_size * layout.dp),
        total_tokens=train.steps * train.global_batch_tokens,
        total_sequences=train.steps * global_batch_size,
        head_dim=head_dim(model),
        memory_dim=memory_dim(model),
        projection_chunk_size=projection_chunk_size(model),
        padded_vocab_size=padded_vocab_size(model),
    )


def head_dim(model: ModelConfig) -> int:
    """Return the width of a head: as set, or an even share of the model's width."""
    return model.head_dim or model.d_model // model.num_heads


def kv_heads(model: ModelConfig) -> int:
    """Return the heads of keys and values of attention: as set, or as many as there are of queries."""
    return model.attention.num_kv_heads or model.num_heads


def memory_dim(model: ModelConfig) -> int | None:
    """Return the hidden width of the mixer's MLP memories, or None where it has none."""
    if model.mixer != "self_modifying" or model.self_modifying.memory != "mlp":
        return None
    return model.self_modifying.memory_dim or head_dim(model)


def projection_chunk_size(model: ModelConfig) -> int | None:
    """Return the tokens between two boundaries of the projection memories, or None where there are none."""
    mixer = model.self_modifying
    return (mixer.projection_chunk_size or mixer.chunk_size) if model.mixer == "self_modifying" else None


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the rows of the embedding: the vocabulary, padded."""
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def has_chunk_loop(mixer: SelfModifyingConfig) -> bool:
    """Tell whether what a mixer writes depends on what its memories hold, so that chunks follow one another."""
    static = not mixer.adaptive and mixer.query == "static"
    stores_values = mixer.memory == "linear" and mixer.objective == "dot" and mixer.read != "boundary"
    return not (static and stores_values)


def fused_obstacle(config: RunConfig, backend: str) -> str | None:
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
    return fused_obstacle(config, "cpp") is None


def computed_again(config: RunConfig) -> str:
    """Return what is computed again, as `train.recompute` says it: operations that run all chunks always do these."""
    return "chunks" if config.train.recompute == "none" and is_fused(config) else config.train.recompute


def memory_banks(model: ModelConfig) -> dict[str, list[str]]:
    """Return the names of the memories in each bank, those that answer with vectors first."""
    mixer = model.self_modifying
    others = [name for name in "kv" if name in mixer.adaptive] + ["q"] * (mixer.query == "memory")
    others += [name for name in ("eta", "alpha") if name in mixer.adaptive]
    if mixer.projection_chunk_size in (None, mixer.chunk_size):
        return {"memory": ["mem", *others]}
    return {"memory": ["mem"], "projection": others}


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


def is_moved_by_map(tokens: int, width: int, out: int, *, momentum: bool) -> bool:
    """Tell whether a chunk moves a layer of `width` inputs by a matrix `width x width`, not by keys and values."""
    return out > width and (momentum or tokens >= width)


def is_trace_smaller(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> bool:
    """Tell whether less says how a chunk moves a layer than its weights, and their momentum, are themselves."""
    return trace_size(tokens, width, out, momentum=momentum, erase=erase) < (1 + momentum) * width * out


def trace_size(tokens: int, width: int, out: int, *, momentum: bool, erase: bool) -> int:
    """Count the entries that say how a chunk moves a layer: `Entry` and `Move` of `ops.delta_rule`."""
    if is_moved_by_map(tokens, width, out, momentum=momentum):
        return (1 + momentum) * width * (width + tokens) + tokens * out
    return (1 + (momentum and erase)) * tokens * (width + out)


def by_period(levels: dict[str, LevelConfig]) -> list[tuple[str, LevelConfig]]:
    """Sort levels fast to slow; names break ties."""
    return sorted(levels.items(), key=lambda item: (item[1].update_every_steps, item[0]))


def levels_of_block(model: ModelConfig, number: int) -> dict[str, LevelConfig]:
    """Return the levels of a block, counted from 0, fast to slow."""
    levels = by_period(model.cms.levels)
    if model.cms.placement == "depth":
        levels = [levels[number * len(levels) // model.num_layers]]
    return dict(levels)
