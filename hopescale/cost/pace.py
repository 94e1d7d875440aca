"""How memories go through a sequence: what of it runs side by side, and what one after the other. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hopescale.config.execution import effective_recompute, is_fused
from hopescale.config.layout import Layout
from hopescale.config.model_shape import (
    has_chunk_loop,
    memory_parts,
    num_pieces,
    projection_chunk_size,
    self_modifying_mixers,
)
from hopescale.config.schema import RunConfig, SelfModifyingConfig
from hopescale.cost.hardware import Device
from hopescale.cost.micro_batch import MicroBatch
from hopescale.cost.roofline import instructions, programs_at_once, waves
from hopescale.cost.self_modifying import self_modifying_activations


@dataclass(frozen=True)
class Pace:
    """How the memories of one block go through a rank's micro batch; as without documents."""

    pieces: int
    """Pieces of a sequence between two resets, which run side by side."""
    programs: int
    """Heads of pieces of a micro batch: what has work that waits for nothing."""
    chunks: int
    """Chunks one after the other; 1 where chunks do not wait either."""
    state_bytes: float
    """Bytes of the states that chunks begin with, from forward to backward."""
    at_once: int | None
    """Programs that a GPU's kernel runs at a time; None where no kernel runs them."""
    waves: int | None
    """How often a GPU fills with them; None where no kernel runs them."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, part: SelfModifyingConfig, recompute: str, device: Device) -> Pace:
        """Return the pace of memories without a far one."""
        micro = MicroBatch.of(config.train, layout)
        pieces = num_pieces(part, micro.seq_len)
        tokens = min(part.reset_every or micro.seq_len, micro.seq_len)
        chunks = -(-tokens // projection_chunk_size(part)) if has_chunk_loop(part) else 1
        programs = pieces * micro.batch * config.model.num_heads // layout.tp
        states = self_modifying_activations(config.model, part, micro, recompute).states
        if device.name == "cpu" or not is_fused(config, part):
            return cls(pieces, programs, chunks, states, None, None)
        warps = instructions(config, part).warps
        at_once = programs_at_once(device, warps)
        return cls(pieces, programs, chunks, states, at_once, waves(programs, device, warps))


def memory_pace(config: RunConfig, layout: Layout, device: Device) -> dict[str, dict[str, Any]]:
    """Return the pace of self-modifying memories by the name of their mixer, and of its far memory as `NAME.far`."""
    result = {}
    for name, mixer in self_modifying_mixers(config.model).items():
        recompute = effective_recompute(config, mixer)
        for label, part in zip((name, f"{name}.far"), memory_parts(mixer), strict=False):
            result[label] = asdict(Pace.of(config, layout, part, recompute, device))
    return result
