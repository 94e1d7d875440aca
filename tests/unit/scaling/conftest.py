"""Tables of runs with a known law."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hopescale.scaling.law import Cost, Law
from hopescale.scaling.points import Points

REPLICATION = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)

IsoFlopRuns = Callable[..., Points]


@pytest.fixture(scope="session")
def chinchilla() -> Path:
    """245 runs of Chinchilla: model size, training FLOP, loss (`data/README.md` names the source)."""
    return Path(__file__).parent / "data" / "chinchilla_figure4.csv"


@pytest.fixture(scope="session")
def isoflop_runs() -> IsoFlopRuns:
    """Make runs of a law at several sizes about the best of several budgets, with noise on log loss."""

    def make(
        law: Law = REPLICATION,
        budgets: int = 7,
        sizes: int = 9,
        span: float = 4.0,
        noise: float = 0.0,
        seed: int = 0,
        cost: float = 6.0,
    ) -> Points:
        flops = np.repeat(np.geomspace(1e19, 1e22, budgets), sizes)
        ratios = np.tile(np.geomspace(1 / span, span, sizes), budgets)
        params = ratios * np.array([law.optimal(budget, Cost(cost))[0] for budget in flops])
        tokens = flops / (cost * params)
        loss = law.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(flops)))
        return Points(params, tokens, flops, loss)

    return make
