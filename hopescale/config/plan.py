"""Counts that a run needs and that follow from its config. Written beside the config, never into it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hopescale.config.layout import Layout, smallest_layout
from hopescale.config.model_shape import (
    head_dim,
    memory_dim,
    padded_vocab_size,
    projection_chunk_size,
    self_modifying_mixers,
)
from hopescale.config.schema import RunConfig


@dataclass(frozen=True)
class RunPlan:
    """Derived values of a run: of its layout, its batches, and those of `model_shape` by their names there."""

    dp: int
    tp: int
    pp: int
    cp: int
    global_batch_size: int
    """Sequences per optimizer step."""
    micro_batch_size: int | None
    """Sequences of a micro batch; None while `train.micro_batch_size` is `auto`."""
    grad_accumulation: int | None
    """Micro batches per optimizer step on each replica; None likewise."""
    total_tokens: int
    """Tokens of the whole run."""
    total_sequences: int
    """Sequences of the whole run."""
    head_dim: int
    memory_dim: dict[str, int | None]
    """Hidden width of the memories by the name of their mixer."""
    projection_chunk_size: dict[str, int]
    padded_vocab_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name, for `plan.json`."""
        return asdict(self)


def make_plan(config: RunConfig, layout: Layout | None = None) -> RunPlan:
    """Derive the plan of a config that has passed its checks; without a layout, on the fewest ranks that run it."""
    layout = layout or smallest_layout(config)
    train, model = config.train, config.model
    memories = self_modifying_mixers(model)
    global_batch_size, size = train.global_batch_tokens // train.seq_len, train.micro_batch_size
    return RunPlan(
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        global_batch_size=global_batch_size,
        micro_batch_size=None if size == "auto" else size,
        grad_accumulation=None if size == "auto" else global_batch_size // (size * layout.dp),
        total_tokens=train.steps * train.global_batch_tokens,
        total_sequences=train.steps * global_batch_size,
        head_dim=head_dim(model),
        memory_dim={name: memory_dim(model, mixer) for name, mixer in memories.items()},
        projection_chunk_size={name: projection_chunk_size(mixer) for name, mixer in memories.items()},
        padded_vocab_size=padded_vocab_size(model),
    )
