"""Self-modifying memories over a whole sequence, fused: what `models` loops over chunks for, in one operation."""

from hopescale.ops.self_modifying.types import ChunkRule, ChunksOutput, Streams, Weights

__all__ = ["ChunkRule", "ChunksOutput", "Streams", "Weights"]
