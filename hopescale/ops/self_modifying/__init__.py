"""Self-modifying memories over a sequence: Hope's own operation. See README.md."""

from hopescale.ops.self_modifying.continued import run_piece
from hopescale.ops.self_modifying.mix import GateWeights, can_mix, mix_heads
from hopescale.ops.self_modifying.naive import self_modifying_naive
from hopescale.ops.self_modifying.operation import self_modifying
from hopescale.ops.self_modifying.resets import run_with_resets
from hopescale.ops.self_modifying.start import MemoryStart
from hopescale.ops.self_modifying.types import (
    KEY_EPS,
    Memories,
    MemorySpec,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    Weights,
)

__all__ = [
    "KEY_EPS",
    "GateWeights",
    "Memories",
    "MemorySpec",
    "MemoryState",
    "SelfModifyingOutput",
    "MemoryStart",
    "Streams",
    "Weights",
    "can_mix",
    "mix_heads",
    "run_piece",
    "run_with_resets",
    "self_modifying",
    "self_modifying_naive",
]
