"""How a run is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hopescale.config.schema.ranges import Count, NumberRange


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of the three axes, whose product is the number of ranks. At most one may be null: what remains."""

    dp: Count | None = None
    """Data parallel: replicas that read different sequences of a step."""
    tp: Count | None = 1
    """Tensor parallel: ranks that share every layer. Divides heads, level widths and the padded vocabulary."""
    pp: Count | None = 1
    """Pipeline parallel: stages that hold consecutive blocks."""
    virtual_stages: Count = 1
    """Slices of the model each pipeline rank holds; above 1 the schedule is interleaved. Needs `pp` of 2 or more."""
    sequence_parallel: bool = False
    """Whether activations between layers are split over tensor-parallel ranks along the tokens. Needs `tp` of 2 or
    more, and a `train.seq_len` it divides."""
    zero: Annotated[int, NumberRange("[0, 3]")] = 0
    """What DeepSpeed shards over data-parallel ranks: 0 nothing, 1 optimizer state and fp32 masters, 2 gradients too, 3
    weights too. 1 and above need `dp` of 2 or more; 2 and 3 need `pp` of 1."""
    timeout_s: Count = 300
    """Seconds a rank waits for the others in one exchange before the run ends as hung."""
    first_step_timeout_s: Count = 1800
    """The same until the end of the first step, which compiles and warms up; not below `timeout_s`."""
