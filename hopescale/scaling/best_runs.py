"""The effective-compute multiplier by the runs alone, without a law: the best runs of series, against each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hopescale.scaling.bootstrap import SAME_BUDGET
from hopescale.scaling.points import Points
from hopescale.scaling.views import lower_envelope


@dataclass(frozen=True)
class RunMultiplier:
    """FLOPs that the reference's best runs need for the loss of the best run of a budget of a series."""

    flops: float
    """FLOPs of the run."""
    loss: float
    value: float | None
    """Times the FLOPs that the reference needs; None where it has no run as good, or none as bad."""
    reached: bool
    """Whether the reference has a run that is as good."""


def multipliers_of_runs(series: Points, reference: Points) -> list[RunMultiplier]:
    """Compare the best run of each budget, unless a cheaper one beats it, with a reference; the cheapest first.

    Between two runs of the reference's lower envelope the log of its FLOPs is a straight line over the loss.
    """
    own, other = _dearest_of_each_budget(lower_envelope(series).points), lower_envelope(reference).points
    loss, logs = other.loss[::-1], np.log(other.flops[::-1])  # of rising loss
    found = []
    for flops, value in zip(own.flops.tolist(), own.loss.tolist(), strict=True):
        between = loss[0] <= value <= loss[-1]
        times = float(np.exp(np.interp(value, loss, logs)) / flops) if between else None
        found.append(RunMultiplier(flops, value, times, bool(value >= loss[0])))
    return found


def _dearest_of_each_budget(envelope: Points) -> Points:
    """Return the last run of each budget of a lower envelope, whose runs are sorted: it is the best of the budget."""
    kept = [len(envelope) - 1]
    for number in range(len(envelope) - 2, -1, -1):
        if SAME_BUDGET * envelope.flops[number] < envelope.flops[kept[-1]]:
            kept.append(number)
    return envelope.take(np.array(kept[::-1]))
