"""The effective-compute multiplier: how many times the compute a reference needs for the same loss.

With `L_s(C)` the least loss of series `s` for `C` FLOPs, along its own compute-optimal sizes,

    m(C) = C_ref / C    where    L_ref(C_ref) = L_s(C).

So `m = 2` at 1e20 FLOPs: the reference needs 2e20 FLOPs for what the series reaches with 1e20. FLOPs are those of the
table, and each series has its own cost of a token by size: a mixer that needs more FLOPs per token pays for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.law import Law
from hopescale.scaling.points import Cost


@dataclass(frozen=True)
class Multiplier:
    """The multiplier of a series at one budget.

    Attributes:
        flops: Budget of the series, FLOPs.
        loss: Loss that it reaches with the budget, nats per token.
        value: `m(C)`; infinite where the reference's `E` is above that loss.
        interval: Interval of `value`.
    """

    flops: float
    loss: float
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Frontier:
    """A series along its compute-optimal sizes: its law, the laws of reweighted fits, and what its tokens cost."""

    law: Law
    samples: Sequence[Law]
    cost: Cost

    def optimal(self, flops: float, law: Law | None = None) -> tuple[float, float]:
        """Return the best parameters and tokens for a budget, by a law of the samples where one is given."""
        return (law or self.law).optimal(flops, self.cost.scale, self.cost.growth)

    def best_loss(self, flops: float, law: Law | None = None) -> float:
        """Return the least loss for a budget."""
        return (law or self.law).loss(*self.optimal(flops, law))

    def flops_for(self, loss: float, law: Law | None = None) -> float:
        """Return the least FLOPs for a loss; infinite where it is not above `E`, or by less than numbers can say."""
        law = law or self.law
        try:
            return law.flops_for(loss, self.cost.scale, self.cost.growth) if loss > law.E else math.inf
        except OverflowError:
            return math.inf


def multiplier(series: Frontier, reference: Frontier, flops: float) -> Multiplier:
    """Return how many times `flops` the reference needs to reach what the series reaches with `flops`."""
    loss = series.best_loss(flops)
    ratios = [
        reference.flops_for(series.best_loss(flops, own), other) / flops
        for own, other in zip(series.samples, reference.samples, strict=True)
    ]
    interval = Interval.of(np.array(ratios)) if ratios else None
    return Multiplier(flops, loss, reference.flops_for(loss) / flops, interval)
