"""Formal languages, of which a model must say at each symbol what may follow (Bhattamishra et al., arXiv 2009.11264).

The answer is the set of the symbols that may follow, the end of the string among them, as one id. Short strings are for
training and longer ones for testing, as there: bins of lengths of `[2, 50]`, `[52, 100]` and `[102, 150]`.

| language | symbols | answers, after the symbols' ids |
|---|---|---|
| `parity`: an even number of 1 | 0 1 | the number of 1 so far is even (the string may end), or odd: ids 0 and 1 again |
| `aa`: `(aa)*` | a | `a` or end, `a` |
| `abab`: `(abab)*` | a b | `a` or end, `b`, `a` |
| `anbn`: `a^n b^n` | a b | `a` or `b`, `b`, end |
| `anbncn`: `a^n b^n c^n` | a b c | `a` or `b`, `b`, `c`, end |
| `shuffle2`: two kinds of brackets, each balanced | ( ) [ ] | by what may close: nothing (end), `)`, `]`, both |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hopescale.suites.task import Example, Settings, Task, blank


def parity(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw bits; the answer is the parity of all so far."""
    bits = generator.integers(2, size=length)
    return Example(bits, bits.cumsum() % 2)


def aa(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Repeat `a`: there is one string of a length."""
    return Example(np.zeros(length, np.int64), 1 + np.arange(1, length + 1) % 2)


def abab(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Repeat `abab`: there is one string of a length."""
    places = np.arange(length)
    return Example(places % 2, np.array([3, 4, 3, 2])[places % 4])


def counted(letters: int) -> Callable[..., Example]:
    """Return the task of `a^n b^n` for 2 letters, of `a^n b^n c^n` for 3; `n` is drawn."""

    def make(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
        count = int(generator.integers(-(-settings["shortest"] // letters), length // letters + 1))
        tokens, answers = blank(length, 2 * letters + 1)
        tokens[: letters * count] = np.repeat(np.arange(letters), count)
        answers[: letters * count] = letters + tokens[: letters * count]
        answers[np.arange(2, letters + 1) * count - 1] += 1
        return Example(tokens, answers)

    return make


def shuffle2(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw a balanced string of each kind of brackets, and how they lie among each other."""
    pairs = int(generator.integers(-(-settings["shortest"] // 2), length // 2 + 1))
    first = int(generator.integers(pairs + 1))
    kinds = generator.permutation(np.repeat([0, 1], [2 * first, 2 * (pairs - first)]))
    steps = np.zeros(2 * pairs, np.int64)
    for kind, count in enumerate((first, pairs - first)):
        steps[kinds == kind] = _balanced(generator, count)
    depths = np.stack([np.where(kinds == kind, steps, 0).cumsum() for kind in (0, 1)])
    tokens, answers = blank(length, 8)
    tokens[: 2 * pairs] = 2 * kinds + (steps < 0)
    answers[: 2 * pairs] = 4 + (depths[0] > 0) + 2 * (depths[1] > 0)
    return Example(tokens, answers)


def _balanced(generator: np.random.Generator, pairs: int) -> np.ndarray:
    """Draw one of all balanced strings of 1 (opens) and -1 (closes), each as likely as any (the cycle lemma)."""
    steps = generator.permutation(np.repeat([1, -1], [pairs + 1, pairs]))
    heights = steps.cumsum()
    begin = len(steps) - int(np.argmin(heights[::-1]))
    return np.roll(steps, -begin)[1:]


def _language(name: str, make: Callable[..., Example], ids: int, multiple: int, chance: float | None) -> Task:
    varies = name in ("anbn", "anbncn", "shuffle2")
    return Task(
        make=make,
        asks=f"what may follow, in {name}",
        source="Bhattamishra et al., 2009.11264",
        num_ids=lambda settings: ids,
        chance=None if chance is None else lambda settings: chance,
        shortest=lambda settings: max(multiple, settings["shortest"] + multiple - 1) if varies else multiple,
        defaults={"shortest": multiple} if varies else {},
    )


TASKS = {
    "parity": _language("parity", parity, 3, 2, 0.5),
    "aa": _language("aa", aa, 4, 2, 0.5),
    "abab": _language("abab", abab, 6, 4, 0.5),
    "anbn": _language("anbn", counted(2), 6, 2, None),
    "anbncn": _language("anbncn", counted(3), 8, 3, None),
    "shuffle2": _language("shuffle2", shuffle2, 9, 2, None),
}
