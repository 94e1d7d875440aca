"""Prediction of one more run's loss: the spread of the law and the noise of runs about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hopescale.scaling.bootstrap import Interval

NUMBERS = 5
"""Numbers of a law, by which residuals are smaller than the noise of runs."""


def prediction_interval(losses: Sequence[float] | np.ndarray, residuals: np.ndarray) -> Interval:
    """Return the interval of the loss of a run from that of its law.

    Each law's prediction is taken with each residual that the fit has left, made larger by as much as five fitted
    numbers have made them smaller; all pairs are equally likely.

    Args:
        losses: Losses that the laws of reweighted fits predict, nats per token, `[K]`.
        residuals: Log of observed over predicted loss of the runs of the fit, `[n]`.
    """
    return Interval.of((np.log(losses)[:, None] + residual_noise(residuals)).ravel()).map(np.exp)


def residual_noise(residuals: np.ndarray) -> np.ndarray:
    """Return residuals as large as those of runs that a fit has not seen, `[n]`; their mean stays."""
    count = len(residuals)
    return residuals * np.sqrt(count / max(1, count - NUMBERS))
