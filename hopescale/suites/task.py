"""The interface of a suite's tasks: examples by a generator, the score of chance, and the best score there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

NOT_ASKED = -1
"""Answer of a position at which nothing is asked."""

Settings = Mapping[str, Any]
"""Values of a task's settings by their names in `SuiteConfig`."""
Fault = tuple[str, str]
"""Name of a setting, and what is wrong with its value."""


class Example(NamedTuple):
    """One question, or several, in a row of symbols. Both of shape `[L]`, int64."""

    tokens: np.ndarray
    """What is read."""
    answers: np.ndarray
    """What must be said after each token; `NOT_ASKED` where nothing is asked."""


def certain(settings: Settings) -> float:
    """Return the best score of a task whose answers follow from the tokens before."""
    return 1.0


def no_faults(settings: Settings) -> Iterator[Fault]:
    """Find nothing wrong with settings."""
    return iter(())


@dataclass(frozen=True)
class Task:
    """A kind of question that is generated. Symbols are ids from 0, in the order that the task's file says."""

    make: Callable[[np.random.Generator, int, Settings, Any], Example]
    """Function of a generator, the length `L`, the settings and the table that gives an example of at most `L`."""
    asks: str
    """What is asked, in a line."""
    source: str
    """Where the task was published."""
    num_ids: Callable[[Settings], int]
    """Function that counts the symbols, of which the last fills rows up."""
    chance: Callable[[Settings], float] | None
    """Function that gives the accuracy of guessing among the answers that the row allows, without knowing which
    belongs to the question; None goes by `choices`, or is the share of the most frequent answer."""
    shortest: Callable[[Settings], int]
    """Function that gives the least length."""
    defaults: Settings = field(default_factory=dict)
    """Settings that the task has, with their values."""
    table: Callable[[np.random.Generator, Settings], Any] | None = None
    """Function that draws what is the same in all examples of a seed: it must be learned by weights."""
    best: Callable[[Settings], float] = certain
    """Function that gives the greatest accuracy that can be expected."""
    faults: Callable[[Settings], Iterator[Fault]] = no_faults
    """Function that finds settings that do not fit each other."""
    choices: Callable[[Example, Settings], np.ndarray] | None = None
    """Function that counts the answers that a row allows at each place, where settings alone do not say it. `[L]`."""
    spell: Callable[[int, Settings], str] | None = None
    """Function that gives the word of an id, for models that read text; None where ids are no words."""


def blank(length: int, filling: int) -> Example:
    """Return a row of one symbol that asks nothing."""
    return Example(np.full(length, filling, np.int64), np.full(length, NOT_ASKED, np.int64))
