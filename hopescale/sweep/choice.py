"""One axis chosen for each series: all its values with the first of the other axes' values, then the best alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hopescale.common.errors import Problem
from hopescale.observe.run_status import DIVERGED, DONE
from hopescale.sweep.schema import SweepConfig
from hopescale.sweep.trial import Trial, TrialChoice

LEFT_OUT = "left out"
"""State of a trial whose value of the chosen axis was not the best, so that it is not trained."""

Ended = Mapping[str, tuple[str, float | None]]
"""State and loss of trials by their names."""


def choose_axis(trials: Sequence[Trial], sweep: SweepConfig) -> list[Trial]:
    """Let trials wait for the choice of an axis's value, but for those by which it is chosen.

    Trials of one series, size and horizon choose together. Those with the first value of every axis but the chosen one
    are trained with all its values.

    Args:
        trials: Trials of a sweep, in its order.
        sweep: Config of the sweep, with `choose`.

    Returns:
        The trials in the same order, each with its choice.
    """
    first = {f"{key}={trials[0].labels[key]}" for key in sweep.axes if key != sweep.choose}
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for trial in trials:
        if first <= _places(trial):
            groups.setdefault(_group(trial, sweep), {})[trial.labels[sweep.choose]] = trial.name
    found = []
    for trial in trials:
        candidates = groups[_group(trial, sweep)]
        twin = candidates[trial.labels[sweep.choose]]
        found.append(replace(trial, choice=TrialChoice(tuple(candidates.values()), twin)))
    return found


def best_of(choice: TrialChoice, ended: Ended) -> str | None:
    """Return the candidate with the least loss, None as long as one of them may go on.

    A candidate that diverged is not chosen. If all did, the first one is, so that its other seeds are tried.

    Args:
        choice: Candidates.
        ended: State and loss of each candidate.
    """
    if any(ended[name][0] not in (DONE, DIVERGED) for name in choice.among):
        return None

    def loss(name: str) -> float:
        state, value = ended[name]
        return value if state == DONE and value is not None else math.inf

    return min(choice.among, key=loss)


def problems(sweep: SweepConfig) -> Iterator[Problem]:
    """Yield the problems of `choose`, which must name an axis with several values."""
    if sweep.choose is None:
        return
    others = [key for key in sweep.axes if key != sweep.choose]
    if sweep.choose not in sweep.axes:
        yield Problem("choose", f"{sweep.choose} is no axis", hint=f"axes are {', '.join(sweep.axes) or 'none'}")
    elif len(sweep.axes[sweep.choose]) < 2:
        yield Problem(
            "choose", f"{sweep.choose} has one value, so there is no choice", hint="give others, or leave it out"
        )
    elif not any(len(sweep.axes[key]) > 1 for key in others):
        hint = "add one, as train.seed: [0, 1, 2], or leave `choose` out"
        yield Problem("choose", "has no effect: no other axis has more than one value", hint=hint)
    if sweep.branch:
        yield Problem("choose", "does not go with branches", hint="choose with a sweep of its own, as hope_laws_rates")


def spent_on(trials: Sequence[Trial]) -> tuple[int, int, int]:
    """Return the FLOPs of the trials that choose, those of the trials that follow, and the number of the latter.

    Of each group as many follow as wait for one candidate, whichever it will be.
    """
    choosing = sum(trial.flops for trial in trials if trial.is_candidate)
    following = [t for t in trials if not t.is_candidate and t.choice.twin == t.choice.among[0]]
    return choosing, sum(trial.flops for trial in following), len(following)


def _places(trial: Trial) -> set[str]:
    return {f"{key}={value}" for key, value in trial.labels.items()}


def _group(trial: Trial, sweep: SweepConfig) -> tuple[str, ...]:
    return (trial.series, *(f"{key}={value}" for key, value in trial.labels.items() if key not in sweep.axes))
