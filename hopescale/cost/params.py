"""The parameters of a model by name, with shapes and how they are split, and their numbers. Imports no torch.

A test holds names, shapes, splits and order to the real modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hopescale.config.model_shape import (
    block_pattern,
    by_period,
    head_dim,
    kv_heads,
    levels_of_block,
    memory_banks,
    memory_dim,
    mixer_of_block,
    padded_vocab_size,
)
from hopescale.config.schema import (
    AttentionConfig,
    LevelConfig,
    LinearAttentionConfig,
    MixerConfig,
    ModelConfig,
    SelfModifyingConfig,
)
from hopescale.cost.linear_attention import linear_attention_parameters
from hopescale.cost.parameter import FP32 as FP32
from hopescale.cost.parameter import ParameterShape as ParameterShape
from hopescale.cost.parameter import itemsize as itemsize

EVERY_STEP = "every step"
"""Name under which parameters of no level are counted."""


def model_parameters(model: ModelConfig, slices: Sequence[range] | None = None) -> list[ParameterShape]:
    """List the parameters of a model, or of the slices (of blocks) that a pipeline rank holds, in the model's order."""
    slices = [range(model.num_layers)] if slices is None else slices
    width, rows = model.d_model, padded_vocab_size(model)
    found: dict[str, ParameterShape] = {}
    for blocks in slices:
        first, last = blocks.start == 0, blocks.stop == model.num_layers
        parts: list[ParameterShape] = []
        if first or (last and model.tie_embeddings):
            parts.append(ParameterShape("embedding.weight", (rows, width), 0))
        for number in blocks:
            parts += block_parameters(model, number)
        if last:
            parts.append(ParameterShape("norm.weight", (width,), keep_fp32=True))
            if not model.tie_embeddings:
                parts.append(ParameterShape("head.weight", (rows, width), 0))
        found |= {part.name: part for part in parts}
    return list(found.values())


def block_parameters(model: ModelConfig, number: int) -> list[ParameterShape]:
    """List the parameters of a block, counted from 0."""
    here, levels = f"blocks.{number}", levels_of_block(model, number)
    mixer = mixer_parameters(model, mixer_of_block(model, number))
    return [
        ParameterShape(f"{here}.norm.weight", (model.d_model,), keep_fp32=True),
        *(replace(part, name=f"{here}.mixer.{part.name}") for part in mixer),
        *(replace(part, name=f"{here}.cms.{part.name}") for part in _levels(model, levels)),
    ]


def mixer_parameters(model: ModelConfig, mixer: MixerConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, by their names in it."""
    parts = {
        AttentionConfig: _attention,
        LinearAttentionConfig: linear_attention_parameters,
        SelfModifyingConfig: _self_modifying,
    }
    return parts[type(mixer)](model, mixer)


def _attention(model: ModelConfig, mixer: AttentionConfig) -> Iterator[ParameterShape]:
    dim = head_dim(model)
    size = (model.num_heads + 2 * kv_heads(model, mixer)) * dim
    yield ParameterShape("qkv_proj.weight", (size, model.d_model), 0)
    if mixer.qkv_bias:
        yield ParameterShape("qkv_proj.bias", (size,), 0)
    yield ParameterShape("out_proj.weight", (model.d_model, model.num_heads * dim), 1)
    for name in ("q_norm", "k_norm") if mixer.qk_norm else ():
        yield ParameterShape(f"{name}.weight", (dim,), keep_fp32=True)


def _self_modifying(model: ModelConfig, mixer: SelfModifyingConfig) -> Iterator[ParameterShape]:
    heads, dim = model.num_heads, head_dim(model)
    yield ParameterShape("in_proj.weight", (heads * dim * num_projections(mixer), model.d_model), 0)
    if mixer.conv_width:
        yield ParameterShape("conv.weight", (heads * dim * 3, mixer.conv_width), 0, keep_fp32=True)
    for gate in ("eta", *["alpha"] * mixer.retention, *["mu"] * mixer.momentum):
        yield ParameterShape(f"gates.{gate}.bias", (heads,), 0, keep_fp32=True)
        if gate not in mixer.adaptive:
            yield ParameterShape(f"gates.{gate}.weight", (heads, dim), 0, keep_fp32=True)
    for bank, names in memory_banks(mixer).items():
        for name in names:
            for matrix, rows, columns in _memory_matrices(model, mixer, 1 if name in ("eta", "alpha") else dim):
                yield ParameterShape(f"banks.{bank}.{name}.{matrix}", (heads, rows, columns), 0, keep_fp32=True)
    yield ParameterShape("norm.weight", (heads, dim), 0, keep_fp32=True)
    yield ParameterShape("out_proj.weight", (model.d_model, heads * dim), 1)


def num_projections(mixer: SelfModifyingConfig) -> int:
    """Count the slices of the in-projection: streams for keys, values and queries, and the output gate."""
    return 3 + mixer.gate


def _memory_matrices(model: ModelConfig, mixer: SelfModifyingConfig, out_dim: int) -> list[tuple[str, int, int]]:
    """List the matrices of one memory as (name, rows, columns)."""
    hidden, dim = memory_dim(model, mixer), head_dim(model)
    return [("w", out_dim, dim)] if hidden is None else [("w2", hidden, dim), ("w1", out_dim, hidden)]


def _levels(model: ModelConfig, levels: dict[str, LevelConfig]) -> Iterator[ParameterShape]:
    width, sequential = model.d_model, model.cms.variant == "sequential"
    if not sequential:
        yield ParameterShape("mix", (len(levels),), keep_fp32=True)
    for name, level in levels.items():
        here = {"level": name}
        if sequential:
            yield ParameterShape(f"levels.{name}.norm.weight", (width,), keep_fp32=True, **here)
        yield ParameterShape(f"levels.{name}.gate.weight", (level.d_ff, width), 0, **here)
        yield ParameterShape(f"levels.{name}.up.weight", (level.d_ff, width), 0, **here)
        yield ParameterShape(f"levels.{name}.down.weight", (width, level.d_ff), 1, **here)
    if not sequential:
        yield ParameterShape("norm.weight", (width,), keep_fp32=True)


def count_params(model: ModelConfig) -> dict[str, int]:
    """Count a model's parameters by part: embedding, head, mixers, levels, norms and their total.

    A tied head counts 0. Norms inside a mixer, over its heads, count with the mixer.
    """
    entries = padded_vocab_size(model) * model.d_model
    counts = {"embedding": entries, "head": 0 if model.tie_embeddings else entries}
    counts |= dict.fromkeys(("mixers", "levels", "norms"), 0)
    pattern = block_pattern(model)
    for name, blocks in Counter(pattern).items():
        for part in block_parameters(model, pattern.index(name)):
            counts[_kind(part.name)] += part.size * blocks
    counts["norms"] += model.d_model
    return {**counts, "total": sum(counts.values())}


def count_level_params(model: ModelConfig) -> dict[str, int]:
    """Count the parameters of each level, fast to slow, and under `every step` those that belong to none."""
    counts: Counter[str] = Counter({name: 0 for name, _ in by_period(model.cms.levels)})
    for part in model_parameters(model):
        counts[part.level or EVERY_STEP] += part.size
    return dict(counts)


def _kind(name: str) -> str:
    if ".mixer." in name:
        return "mixers"
    return "norms" if name.endswith("norm.weight") else "levels"
