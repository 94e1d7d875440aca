"""Self-modifying memories over a whole sequence, fused: what `models` loops over chunks for, in one operation."""

from hopescale.ops.self_modifying.backend import Backend, SelfModify, fused_chunks
from hopescale.ops.self_modifying.types import ChunksOutput, MemorySpec, Streams, Weights

__all__ = ["Backend", "MemorySpec", "ChunksOutput", "SelfModify", "Streams", "Weights", "fused_chunks"]
