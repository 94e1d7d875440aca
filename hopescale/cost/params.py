"""The parameters of a model by name, with shapes and how they are split, and their numbers. Imports no torch.

A test holds names, shapes, splits and order to the real modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hopescale.common.units import format_count
from hopescale.config.model_shape import (
    by_period,
    levels_of_block,
    mixer_counts,
    mixer_of_block,
    padded_vocab_size,
    phases,
)
from hopescale.config.schema import (
    LevelConfig,
    ModelConfig,
)
from hopescale.cost.mixers import COSTS
from hopescale.cost.parameter import ParameterShape

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
    mixer = mixer_of_block(model, number)
    return [
        ParameterShape(f"{here}.norm.weight", (model.d_model,), keep_fp32=True),
        *(replace(part, name=f"{here}.mixer.{part.name}") for part in COSTS[mixer.kind].parameters(model, mixer)),
        *(replace(part, name=f"{here}.cms.{part.name}") for part in _levels(model, levels, number)),
    ]


def _levels(model: ModelConfig, levels: dict[str, LevelConfig], number: int) -> Iterator[ParameterShape]:
    width, sequential = model.d_model, model.cms.variant == "sequential"
    if not sequential:
        yield ParameterShape("mix", (len(levels),), keep_fp32=True)
    for name, level in levels.items():
        here = {"level": name, "phase": phases(model, name)[number] if level.rolling else level.phase}
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
    for mixer, blocks in mixer_counts(model):
        first = next(number for number in range(model.num_layers) if mixer_of_block(model, number) is mixer)
        for part in block_parameters(model, first):
            counts[_kind(part.name)] += part.size * blocks
    counts["norms"] += model.d_model
    return {**counts, "total": sum(counts.values())}


def describe_params(model: ModelConfig) -> str:
    """Write the parameters of a model by part, in one line."""
    counts = {part: format_count(count) for part, count in count_params(model).items()}
    if model.tie_embeddings:
        counts["head"] = "tied"
    return ", ".join(f"{part} {count}" for part, count in counts.items())


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
