"""AdamW: torch's, with its state from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), `torch.optim.AdamW` with the same arguments.

    torch makes a parameter's state at its first update; here it is made when the parameter is added, so that every
    checkpoint has the same tensors: `step` (0-dim float32 on the CPU), and `exp_avg` and `exp_avg_sq` in the
    parameter's shape.

    Raises:
        ValueError: For a variant whose state differs: `amsgrad`, `fused` or `capturable`.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        other = [name for name in ("amsgrad", "fused", "capturable") if any(g[name] for g in self.param_groups)]
        if other:
            raise ValueError(f"AdamW keeps the state of torch's plain variant, not of {', '.join(other)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters and make their state."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p] = adamw_state(p)


def adamw_state(p: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first update."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
