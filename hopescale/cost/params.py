"""Parameters of a model, counted from its config alone. Imports no torch."""

from __future__ import annotations

from collections import Counter

from hopescale.config.model_shape import by_period, padded_vocab_size
from hopescale.config.schema import ModelConfig
from hopescale.cost.inventory import block_parameters, model_parameters


def count_params(model: ModelConfig) -> dict[str, int]:
    """Count a model's parameters by part: embedding, head, mixers, levels, norms and their total.

    A tied head counts 0. Norms inside a mixer, over its heads, count with the mixer.
    """
    entries = padded_vocab_size(model) * model.d_model
    counts = {"embedding": entries, "head": 0 if model.tie_embeddings else entries}
    of_block: Counter[str] = Counter()
    for part in block_parameters(model, 0):
        of_block[_kind(part.name)] += part.size
    counts |= {kind: model.num_layers * of_block[kind] for kind in ("mixers", "levels", "norms")}
    counts["norms"] += model.d_model
    return {**counts, "total": sum(counts.values())}


def count_level_params(model: ModelConfig) -> dict[str, int]:
    """Count the parameters of each level, fast to slow, and under `every step` those that belong to none."""
    counts: Counter[str] = Counter({name: 0 for name, _ in by_period(model.cms.levels)})
    for part in model_parameters(model):
        counts[part.level or EVERY_STEP] += part.size
    return dict(counts)


EVERY_STEP = "every step"
"""What belongs to no level is updated at every step."""


def _kind(name: str) -> str:
    if ".mixer." in name:
        return "mixers"
    return "norms" if name.endswith("norm.weight") else "levels"
