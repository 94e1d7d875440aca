"""Which runs would tell most of a question, within a budget: a design chosen by the laws of reweighted fits.

The reweighted fits are a sample of what the law may be. In it the answer to a question and the loss that each possible
run would have vary together, and the more they do, the more the run would tell: with `c` their covariance, `v` the
variance of that loss and `s` the noise of a run, seeing it takes `c^2 / (v + s^2)` off the answer's variance. Runs are
chosen one after the other, with what the chosen ones tell counted: once those that take off most, and once those that
take off most for their FLOPs. The better of both designs is proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from hopescale.common.errors import DataError
from hopescale.common.units import format_count
from hopescale.scaling.analysis import Analysis, SeriesAnalysis
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.law import Law
from hopescale.scaling.points import Table
from hopescale.scaling.prediction import residual_noise
from hopescale.scaling.rates import RateLaw, fit_rates, read_tuned

Question = Literal["exponent", "size", "loss", "multiplier"]
"""`exponent`: `a` of the best `N ~ C^a`. `size`: the best size for a budget. `loss`: the least loss for it.
`multiplier`: the effective-compute multiplier over the reference at it."""

DECAY = 0.2
"""Part of a horizon's steps that a branch of a longer run trains of its own."""

_SIZES, _HORIZONS = 9, 9
_BEYOND = 2.0
_FARTHEST = 1e6
"""Multipliers beyond this, either way, count as this."""
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class NextRun:
    """A run that is proposed."""

    series: str
    params: float
    tokens: float
    flops: float
    """Training FLOPs of a whole run."""
    left: float
    """Part of the interval's width that is left when this run and those before it are seen."""


@dataclass(frozen=True)
class Proposal:
    """Runs in the order in which they tell most for their FLOPs."""

    question: Question
    flops: float
    """Budget that the question is about, FLOPs."""
    value: float
    before: Interval
    after: Interval
    runs: list[NextRun]
    spent: float
    """Training FLOPs of all of them, with what branches share counted once."""


def propose(
    analysis: Analysis,
    question: Question,
    budget: float,
    *,
    flops: float | None = None,
    series: str | None = None,
    branch: bool = False,
    most: int = 12,
) -> Proposal:
    """Choose runs that shrink the interval of a question most within a budget.

    Sizes reach from half the smallest to twice the largest that was run, and tokens alike; no run is larger than the
    budget.

    Args:
        analysis: Laws with repeated fits.
        question: Question.
        budget: Training FLOPs to spend.
        flops: Budget that the question is about; None is ten times the largest that was run.
        series: Series of the question; None is the only one, or the first that is not the reference.
        branch: Whether horizons of one size are branches of its longest.
        most: Number of runs at most.

    Raises:
        DataError: If there is no such series, no reference for a multiplier, no repeated fits, or no run that the
            budget buys.
    """
    name, parts = _series_of(analysis, question, series)
    flops = flops or 10 * max(float(parts[name].points.flops.max()), 1.0)
    answer = _answer(question, flops, [parts[key] for key in parts])
    answers = np.array([answer(laws) for laws in zip(*(part.frontier.samples for part in parts.values()), strict=True)])
    candidates = [run for key, part in parts.items() for run in _candidates(key, part, budget)]
    if not candidates:
        raise DataError(f"{budget:.3g} FLOPs buy none of the runs that would tell something", "give more FLOPs")
    losses = np.concatenate(
        [_log_losses(part, [run for run in candidates if run[0] == key]) for key, part in parts.items()]
    )
    noise = np.array([float(np.var(residual_noise(parts[run[0]].fit.residuals))) for run in candidates])
    covariance = np.cov(np.concatenate([answers[None], losses]))
    both = [_choose(covariance, noise, candidates, budget, branch, most, thrifty=thrifty) for thrifty in (False, True)]
    chosen, lefts = min(both, key=lambda found: found[1][-1] if found[1] else 1.0)
    value = float(answer([part.fit.law for part in parts.values()]))
    before = Interval.of(answers)
    share = lefts[-1] if lefts else 1.0
    after = Interval(value + share * (before.low - value), value + share * (before.high - value))
    runs = [NextRun(*candidates[place], left) for place, left in zip(chosen, lefts, strict=True)]
    back = (lambda number: number) if question == "exponent" else np.exp
    spent = _spent([candidates[place] for place in chosen], branch)
    return Proposal(question, flops, float(back(value)), before.map(back), after.map(back), runs, spent)


def best_settings(table: Table) -> dict[str, Callable[[float, float], str]]:
    """Return functions that write the best rate and batch for a size and tokens, of the series that tell them.

    Where no batch is the best, the rate is for the middle of those that were run.

    Raises:
        DataError: If a cell of rates or batches is not a number above 0.
    """
    found: dict[str, Callable[[float, float], str]] = {}
    if not table.has("lr"):
        return found
    for name, runs in read_tuned(table).items():
        with suppress(DataError):
            found[name] = partial(_settings, fit_rates(runs), float(np.median(runs.batch)))
    return found


def _settings(law: RateLaw, usual_batch: float, params: float, tokens: float) -> str:
    one = np.ones(1)
    batch = float(law.batch(params * one, tokens * one, one)[0]) if law.batch else usual_batch
    lr = float(law.lr(params * one, tokens * one, batch * one)[0])
    return f", lr {lr:.3g}" + (f", batch {batch:.3g}" if law.batch or usual_batch > 1 else "")


def describe_proposal(proposal: Proposal, settings: Mapping[str, Callable[[float, float], str]]) -> list[str]:
    """Return lines that tell a person which runs to make and how far these would narrow the law.

    Args:
        proposal: Runs.
        settings: Functions of `best_settings`, by series.
    """
    what = {
        "exponent": "a of the best size N ~ C^a",
        "size": f"the best size for {proposal.flops:.3g} FLOPs",
        "loss": f"the least loss for {proposal.flops:.3g} FLOPs",
        "multiplier": f"the multiplier at {proposal.flops:.3g} FLOPs",
    }[proposal.question]
    write = (lambda number: format_count(number)) if proposal.question == "size" else (lambda number: f"{number:.4g}")
    before, after = (f"{write(one.low)} to {write(one.high)}" for one in (proposal.before, proposal.after))
    lines = [f"{what}: {write(proposal.value)} ({before})"]
    for run in proposal.runs:
        tuned = settings[run.series](run.params, run.tokens) if run.series in settings else ""
        size = f"N {format_count(run.params)}, D {format_count(run.tokens)}{tuned}"
        left = f"{100 * run.left:.0f} % of the interval is left"
        lines.append(f"  {run.series}: {size}, {run.flops:.3g} FLOPs: {left}")
    return [*lines, f"  with these, for {proposal.spent:.3g} FLOPs, about {after}"]


def proposal_json(proposal: Proposal) -> dict[str, Any]:
    """Return a proposal as JSON has it."""
    intervals = {"before": vars(proposal.before), "after": vars(proposal.after)}
    return {**vars(proposal), **intervals, "runs": [vars(run) for run in proposal.runs]}


def _series_of(analysis: Analysis, question: Question, series: str | None) -> tuple[str, dict[str, SeriesAnalysis]]:
    """Return the series of a question, with the reference behind it where that is needed."""
    others = [name for name in analysis.series if name != analysis.reference]
    name = series or (others or list(analysis.series))[0]
    if name not in analysis.series:
        raise DataError(f"there is no series {name}, only {', '.join(analysis.series)}")
    names = [name]
    if question == "multiplier":
        if analysis.reference is None or name == analysis.reference:
            raise DataError("a multiplier needs a series and another as its reference", "name them, or ask otherwise")
        names.append(analysis.reference)
    parts = {key: analysis.series[key] for key in names}
    if any(part.frontier is None or len(part.frontier.samples) < 2 for part in parts.values()):
        raise DataError("the laws have no intervals, so that no run is known to tell more than another")
    return name, parts


def _answer(question: Question, flops: float, parts: Sequence[SeriesAnalysis]) -> Callable[[Sequence[Law]], float]:
    """Return the question as a function of laws; all but the exponent are logs."""
    cost = parts[0].frontier.cost
    if question == "exponent":
        return lambda laws: laws[0].optimal_exponents(cost)[0]
    if question == "size":
        return lambda laws: float(np.log(laws[0].optimal(flops, cost)[0]))
    if question == "loss":
        return lambda laws: float(np.log(laws[0].best_loss(flops, cost)))
    other = parts[1].frontier.cost

    def multiplier(laws: Sequence[Law]) -> float:
        times = laws[1].flops_for(laws[0].best_loss(flops, cost), other) / flops
        return float(np.log(np.clip(times, 1 / _FARTHEST, _FARTHEST)))

    return multiplier


def _candidates(name: str, part: SeriesAnalysis, budget: float) -> list[tuple[str, float, float, float]]:
    """Return series, parameters, tokens and FLOPs of runs about those that were run."""
    runs, cost = part.points, part.frontier.cost
    sizes = np.geomspace(runs.params.min() / _BEYOND, runs.params.max() * _BEYOND, _SIZES)
    horizons = np.geomspace(runs.tokens.min(), runs.tokens.max() * _BEYOND, _HORIZONS)
    found = []
    for params in sizes.tolist():
        for tokens in horizons.tolist():
            flops = cost.per_param_token(params) * params * tokens
            if flops <= budget:
                found.append((name, params, tokens, flops))
    return found


def _log_losses(part: SeriesAnalysis, runs: Sequence[tuple[str, float, float, float]]) -> np.ndarray:
    """Return the log of the loss of runs by each law of the sample, `[m, K]`."""
    params, tokens = (np.array([run[place] for run in runs]) for place in (1, 2))
    return np.log([law.loss(params, tokens) for law in part.frontier.samples]).T


def _choose(
    covariance: np.ndarray,
    noise: np.ndarray,
    candidates: Sequence[tuple[str, float, float, float]],
    budget: float,
    branch: bool,
    most: int,
    *,
    thrifty: bool,
) -> tuple[list[int], list[float]]:
    """Choose runs one after the other; return their places, and the part of the answer's deviation left after each.

    `thrifty` weighs what a run tells by its FLOPs. No run is chosen twice.
    """
    covariance, start = covariance.copy(), max(float(covariance[0, 0]), 1e-300)
    chosen: list[int] = []
    lefts: list[float] = []
    while len(chosen) < most:
        spent = _spent([candidates[place] for place in chosen], branch)
        gains = covariance[0, 1:] ** 2 / (np.diag(covariance)[1:] + noise)
        costs = np.array([_spent([candidates[place] for place in [*chosen, new]], branch) for new in range(len(noise))])
        more = np.maximum(costs - spent, 1e-12 * budget)
        worth = np.where(costs <= budget, gains / more if thrifty else gains, -1.0)
        worth[gains < _LEAST_GAIN * start] = -1.0
        worth[chosen] = -1.0
        best = int(np.argmax(worth))
        if worth[best] <= 0:
            break
        row = covariance[best + 1].copy()
        covariance -= np.outer(row, row) / (row[best + 1] + noise[best])
        chosen.append(best)
        lefts.append(float(np.sqrt(max(0.0, covariance[0, 0]) / start)))
    return chosen, lefts


def _spent(runs: Sequence[tuple[str, float, float, float]], branch: bool) -> float:
    """Return the training FLOPs of runs; those of one size share a run but for their decays where they branch."""
    sizes: dict[tuple[str, float], list[float]] = {}
    for name, params, _, flops in runs:
        sizes.setdefault((name, params), []).append(flops)
    own = DECAY if branch else 1.0
    return sum(max(each) + own * (sum(each) - max(each)) for each in sizes.values())
