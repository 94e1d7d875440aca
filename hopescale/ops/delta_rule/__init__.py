"""The gated delta rule with momentum: the one recurrence under every memory of the model. See README.md."""

from hopescale.ops.delta_rule.chunked import (
    Chunk,
    ChunkUpdate,
    Move,
    Values,
    chunk_values,
    move_chunk,
    open_chunk,
    read_chunk,
    write_chunk,
)
from hopescale.ops.delta_rule.decay import DecayWeights, decay_weights
from hopescale.ops.delta_rule.naive import delta_rule_naive
from hopescale.ops.delta_rule.operation import delta_rule
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read

__all__ = [
    "Chunk",
    "DecayWeights",
    "DeltaRuleOutput",
    "ChunkUpdate",
    "Move",
    "Read",
    "Values",
    "decay_weights",
    "chunk_values",
    "delta_rule",
    "delta_rule_naive",
    "move_chunk",
    "open_chunk",
    "read_chunk",
    "write_chunk",
]
