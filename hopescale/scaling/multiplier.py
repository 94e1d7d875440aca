"""The effective-compute multiplier: how many times the compute a reference needs for the same loss.

With `L_s(C)` the least loss of series `s` for `C` FLOPs, along its own compute-optimal sizes,

    m(C) = C_ref / C    where    L_ref(C_ref) = L_s(C).

So `m = 2` at 1e20 FLOPs: the reference needs 2e20 FLOPs for what the series reaches with 1e20. FLOPs are those of the
table, and each series has its own cost of a token by size: a mixer that needs more FLOPs per token pays for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.law import Cost, Law


@dataclass(frozen=True)
class Multiplier:
    """The multiplier of a series at one budget."""

    flops: float
    """Budget of the series, FLOPs."""
    loss: float
    """Loss that it reaches with the budget, nats per token."""
    value: float
    """Number `m(C)`; infinite where the reference's `E` is above that loss."""
    interval: Interval | None


@dataclass(frozen=True)
class Frontier:
    """A series along its compute-optimal sizes: its law, the laws of reweighted fits, and the cost of its tokens."""

    law: Law
    samples: Sequence[Law]
    cost: Cost


def multiplier(series: Frontier, reference: Frontier, flops: float) -> Multiplier:
    """Return how many times `flops` the reference needs to reach the loss that the series reaches with `flops`."""

    def ratio(own: Law, other: Law) -> float:
        return other.flops_for(own.best_loss(flops, series.cost), reference.cost) / flops

    ratios = list(map(ratio, series.samples, reference.samples))
    value, loss = ratio(series.law, reference.law), series.law.best_loss(flops, series.cost)
    return Multiplier(flops, loss, value, Interval.of(ratios) if ratios else None)
