"""A second view without a law: the runs that no cheaper run beats, and how their sizes grow.

(Hoffmann et al., arXiv 2203.15556, section 3.1, over finished runs instead of their curves.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hopescale.scaling.isoflop import PowerLaw
from hopescale.scaling.points import Points


@dataclass(frozen=True)
class Envelope:
    """The lower envelope of a table's runs over FLOPs.

    Attributes:
        points: Runs on the envelope, the cheapest first.
        params: `N(C)` through them; None where they are fewer than three.
        tokens: `D(C)`.
    """

    points: Points
    params: PowerLaw | None
    tokens: PowerLaw | None


def lower_envelope(points: Points) -> Envelope:
    """Return the runs with less loss than every run of as many FLOPs or fewer, and power laws through them.

    The laws carry no intervals: which runs lie on the envelope is itself decided by noise.
    """
    order = np.lexsort((points.loss, points.flops))
    best = np.minimum.accumulate(points.loss[order])
    front = points.take(order[np.concatenate([[True], best[1:] < best[:-1]])])
    if len(front) < 3:
        return Envelope(front, None, None)
    return Envelope(front, PowerLaw.through(front.flops, front.params), PowerLaw.through(front.flops, front.tokens))
