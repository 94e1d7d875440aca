"""Needles in a haystack (RULER, arXiv 2404.06654, Section 3), in words of a small language.

A needle is `KEY holds DIGITS .` within a text; the question at the end is `? KEY holds`, and asks for the digits, one
after the other, the earlier ones shown. All digits right is what a greedy answer would be.

| task | as in RULER |
|---|---|
| `needle_single_1` | one needle, in a sentence that is repeated |
| `needle_single_2` | one needle, in prose |
| `needle_single_3` | one needle of a long value, in prose |
| `needle_multikey` | needles of other keys as well, one of them asked |
| `needle_multivalue` | needles of one key, all asked, in the order of the text |
| `needle_multiquery` | needles of several keys, all asked |

RULER takes essays for prose, whole words for keys, numbers of seven digits or UUIDs for values, and any order of
several values; its questions are put in English.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hopescale.suites import prose
from hopescale.suites.task import Example, Fault, Settings, Task, blank

DIGITS = 10
HOLDS, ASKS, AND = range(len(prose.WORDS), len(prose.WORDS) + 3)
"""Ids of the words `holds`, `?` and `and`, which stands between values; digits follow, and then the keys."""
FIRST_DIGIT = AND + 1
FIRST_KEY = FIRST_DIGIT + DIGITS


@dataclass(frozen=True)
class Needles:
    """A kind of needles: how a haystack is made, and which needles are asked."""

    haystack: str
    own_keys: bool = True
    """Whether every needle has a key of its own."""
    all_asked: bool = True
    """Whether all needles are asked, and not only one of them."""

    def make(self, generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
        """Draw needles and the text around them."""
        count, size = settings.get("num_pairs", 1), settings["value_length"]
        values = FIRST_DIGIT + generator.integers(DIGITS, size=(count, size))
        keys = FIRST_KEY + generator.permutation(settings["num_symbols"])[: count if self.own_keys else 1]
        keys = np.broadcast_to(keys, count)
        told = [[key, HOLDS, *value, *prose.spelled(".")] for key, value in zip(keys, values, strict=True)]
        room = length - self._question(settings)
        row = prose.hide(generator, told, room, distance=settings["distance"], haystack=self.haystack)
        tokens, answers = blank(length, self.num_ids(settings) - 1)
        if not self.all_asked:  # with a distance, that of the last
            asked = [int(generator.integers(count)) if settings["distance"] is None else count - 1]
        else:
            asked = generator.permutation(count) if self.own_keys else np.arange(count)
        for place, number in enumerate(asked):
            row += [ASKS, keys[number], HOLDS] if self.own_keys or not place else [AND]
            begin = len(row) - 1
            row += values[number].tolist()
            answers[begin : begin + size] = values[number]
        tokens[: len(row)] = row
        return Example(tokens, answers)

    def _question(self, settings: Settings) -> int:
        """Count the words of all questions and their answers."""
        count = settings.get("num_pairs", 1) if self.all_asked else 1
        return (3 * count if self.own_keys else 2 + count) + count * settings["value_length"]

    def shortest(self, settings: Settings) -> int:
        """Count the words that must fit: needles, distance, a sentence around it, questions."""
        told = settings.get("num_pairs", 1) * (3 + settings["value_length"])
        return told + (settings["distance"] or 0) + 2 * prose.LONGEST + self._question(settings)

    def num_ids(self, settings: Settings) -> int:
        """Count words, digits, keys and the filling."""
        return FIRST_KEY + settings["num_symbols"] + 1

    def spell(self, word: int, settings: Settings) -> str:
        """Return the word of an id; keys are names."""
        if word < len(prose.WORDS):
            return prose.WORDS[word]
        if word < FIRST_DIGIT:
            return ("holds", "Remember:", "and")[word - HOLDS]
        return str(word - FIRST_DIGIT) if word < FIRST_KEY else prose.name(word - FIRST_KEY)

    def faults(self, settings: Settings) -> Iterator[Fault]:
        """Find too few keys."""
        count = settings.get("num_pairs", 1)
        if self.own_keys and count > settings["num_symbols"]:
            yield "num_pairs", f"{count} needles need as many keys, num_symbols is {settings['num_symbols']}"


def _task(kind: Needles, asks: str, count: int | None, size: int) -> Task:
    several = {} if count is None else {"num_pairs": count}
    return Task(
        make=kind.make,
        asks=asks,
        source="RULER, 2404.06654",
        num_ids=kind.num_ids,
        chance=lambda settings: 1 / DIGITS,
        shortest=kind.shortest,
        defaults={"num_symbols": 32, "value_length": size, "distance": None, **several},
        faults=kind.faults,
        spell=kind.spell,
    )


TASKS = {
    "needle_single_1": _task(Needles("repeat"), "a value that is told in a repeated sentence", None, 4),
    "needle_single_2": _task(Needles("prose"), "a value that is told in prose", None, 4),
    "needle_single_3": _task(Needles("prose"), "a long value that is told in prose", None, 16),
    "needle_multikey": _task(Needles("prose", all_asked=False), "one of the values of several keys", 4, 4),
    "needle_multivalue": _task(Needles("prose", own_keys=False), "all values of one key", 4, 4),
    "needle_multiquery": _task(Needles("prose"), "the values of all keys", 4, 4),
}
