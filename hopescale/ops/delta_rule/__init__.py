"""The gated delta rule with momentum: the one recurrence under every memory of the model. See README.md."""

from hopescale.ops.delta_rule.chunked import ChunkTables, chunk_tables, delta_rule, predict, read_chunk, write_chunk
from hopescale.ops.delta_rule.naive import delta_rule_naive
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read

__all__ = [
    "ChunkTables",
    "DeltaRuleOutput",
    "Read",
    "chunk_tables",
    "delta_rule",
    "delta_rule_naive",
    "predict",
    "read_chunk",
    "write_chunk",
]
