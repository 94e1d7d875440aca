"""State that every token changes: sums modulo a number, and products of permutations.

Products of permutations of five objects are the word problem of S5, which is complete for NC1 and which no layer with a
diagonal transition can follow (*The Illusion of State*, arXiv 2404.08819). Grazzi et al. (arXiv 2411.12537) restrict
how many objects move. After each token the state is asked.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Any

import numpy as np

from hopescale.suites.task import Example, Settings, Task


def modular_sum(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw numbers; the answer is their sum so far, modulo `num_symbols`."""
    numbers = generator.integers(settings["num_symbols"], size=length)
    return Example(numbers, numbers.cumsum() % settings["num_symbols"])


def permuted(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw permutations that move at most `num_moved` objects; the answer is their product so far, the last one last.

    The id of a permutation is its number in lexicographic order.
    """
    group = _group(settings["num_symbols"])
    moved = (group != np.arange(settings["num_symbols"])).sum(1)
    tokens = generator.choice(np.flatnonzero(moved <= settings["num_moved"]), size=length)
    state, answers = 0, []
    products = _products(settings["num_symbols"])
    for token in tokens:
        state = int(products[state, token])
        answers.append(state)
    return Example(tokens, np.array(answers))


def _group(objects: int) -> np.ndarray:
    """List all permutations in lexicographic order. Shape `[n!, n]`."""
    return np.array(list(permutations(range(objects))))


@cache
def _products(objects: int) -> np.ndarray:
    """Return the id of the permutation that does the first, then the second. Shape `[n!, n!]`."""
    group = _group(objects)
    powers = objects ** np.arange(objects)[::-1]
    codes = group @ powers  # ascending, as the group is
    return np.searchsorted(codes, np.take_along_axis(group[None], group[:, None], axis=2) @ powers).astype(np.int64)


def _size(settings: Settings) -> int:
    return len(_group(settings["num_symbols"]))


def _too_many(settings: Settings):
    if settings["num_symbols"] > 6:
        yield "num_symbols", f"{settings['num_symbols']} objects have too many permutations; at most 6"
    if settings["num_moved"] > settings["num_symbols"]:
        yield "num_moved", f"{settings['num_moved']} exceeds num_symbols = {settings['num_symbols']}"


TASKS = {
    "modular_sum": Task(
        make=modular_sum,
        asks="the sum of all numbers so far, modulo num_symbols",
        source="Grazzi et al., 2411.12537",
        num_ids=lambda settings: settings["num_symbols"] + 1,
        chance=lambda settings: 1 / settings["num_symbols"],
        shortest=lambda settings: 2,
        defaults={"num_symbols": 5},
    ),
    "permutations": Task(
        make=permuted,
        asks="the product of all permutations so far",
        source="The Illusion of State, 2404.08819",
        num_ids=lambda settings: _size(settings) + 1,
        chance=lambda settings: 1 / _size(settings),
        shortest=lambda settings: 2,
        defaults={"num_symbols": 5, "num_moved": 5},
        faults=_too_many,
    ),
}
