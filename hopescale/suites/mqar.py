"""Multi-query associative recall (Zoology, arXiv 2312.04927, Section 4 and Appendix C).

A row has pairs of a key and its value; then each key comes once more, after gaps that follow a power law, and its value
is asked. Keys are of the lower half of the symbols, values of the upper half. Both are distinct within a row, and every
row has its own pairs. As in the paper, a value is not shown after its question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hopescale.suites.task import Example, Fault, Settings, Task, blank

POWER = 0.01
"""Exponent `a` of the gaps: position `i` of the questions has a weight of `i^(a - 1)`, as in the paper."""


def make(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw pairs and the places of their questions."""
    symbols, count = settings["num_symbols"], settings["num_pairs"]
    tokens, answers = blank(length, symbols)
    keys = generator.permutation(symbols // 2)[:count]
    values = symbols // 2 + generator.permutation(symbols // 2)[:count]
    tokens[: 2 * count] = np.stack([keys, values], axis=1).ravel()
    begin = 2 * count + settings["distance"]
    slots = (length - begin) // 2
    weights = np.arange(1, slots + 1) ** (POWER - 1)
    places = begin + 2 * generator.choice(slots, size=count, replace=False, p=weights / weights.sum())
    tokens[places], answers[places] = keys, values
    return Example(tokens, answers)


def _faults(settings: Settings) -> Iterator[Fault]:
    if settings["num_pairs"] > settings["num_symbols"] // 2:
        yield "num_pairs", f"{settings['num_pairs']} pairs need as many keys, half of num_symbols: at least twice that"


TASKS = {
    "mqar": Task(
        make=make,
        asks="the value of each key, once",
        source="Zoology, 2312.04927",
        num_ids=lambda settings: settings["num_symbols"] + 1,
        chance=lambda settings: 1 / settings["num_pairs"],
        shortest=lambda settings: 4 * settings["num_pairs"] + settings["distance"],
        defaults={"num_symbols": 64, "num_pairs": 8, "distance": 0},
        faults=_faults,
    )
}
