"""Statistics of memories over tokens, for probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEANS = ("eta_mean", "alpha_mean", "surprise")
"""Names of the means of what `ops.self_modifying` says of a head at a token, in its order."""


def statistics_of(values: Tensor, norms: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what a probe is filled with.

    Args:
        values: Values at heads and tokens `[..., 3]`, in any order.
        norms: Largest norms of memories, of one call or of several.

    Returns:
        The means, `state_norm`, and `tokens`, the values that the means are of, one row per head and token.
    """
    rows = values.flatten(0, -2)
    return dict(zip(MEANS, rows.mean(0), strict=True)) | {"state_norm": torch.stack(list(norms)).max(), "tokens": rows}


def by_token(probe: dict[str, Tensor], batch: int, heads: int) -> Tensor:
    """Return the values of a probe that a call over `[T, B]` tokens has filled: `[T, B, H, 3]`, without gradients."""
    return probe["tokens"].detach().unflatten(0, (batch, heads, -1)).permute(2, 0, 1, 3)
