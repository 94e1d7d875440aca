"""One parameter by name, shape and split, and the bytes of its entries. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FP32 = 4
"""Bytes of a float32 entry."""


LevelPart = tuple[str, int]
"""The blocks of a level that are updated together: its name, and their phase."""


@dataclass(frozen=True)
class ParameterShape:
    """One parameter: its name in the model, and the shape of the whole, or of this rank's slice."""

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    """Dimension that is split over tensor-parallel ranks; None if every rank holds the whole."""
    keep_fp32: bool = False
    """Whether it stays float32 in a model of lower precision."""
    level: str | None = None
    """Name of the level it belongs to; None if it is updated at every step."""
    phase: int = 0
    """Phase of the level in its block."""
    parts: tuple[tuple[int, int], ...] = ()
    """Projections that it fuses, as in `ParameterSpec`."""

    @property
    def due(self) -> LevelPart | None:
        """What is updated at the same steps; None is updated at every step."""
        return None if self.level is None else (self.level, self.phase)

    @property
    def block(self) -> int | None:
        """Number of the block that it is in, from 0; None outside of blocks."""
        return int(self.name.split(".")[1]) if self.name.startswith("blocks.") else None

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    def slice(self, tp: int) -> ParameterShape:
        """Return the part that one of `tp` tensor-parallel ranks holds."""
        if self.split is None or tp == 1:
            return self
        shape = tuple(n // tp if dim == self.split else n for dim, n in enumerate(self.shape))
        return replace(self, shape=shape)

    def itemsize(self, precision: str) -> int:
        """Return the bytes of an entry in `bf16` or `fp32`."""
        return FP32 if self.keep_fp32 else itemsize(precision)


def itemsize(precision: str) -> int:
    """Return the bytes of an entry of the residual stream, and of most weights, in `bf16` or `fp32`."""
    return {"bf16": 2, "fp32": FP32}[precision]
