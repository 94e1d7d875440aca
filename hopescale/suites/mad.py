"""The token tasks of MAD (Mechanistic Architecture Design, arXiv 2403.17844, Section 3), for a causal model.

- `noisy_recall`: pairs of key and value, and among them tokens of noise; a key that has come before asks for its value.
- `fuzzy_recall`: the same with keys and values of several tokens each.
- `selective_copy`: symbols among blanks, a marker, then as many blanks, which ask for the symbols in their order.
- `compress`: symbols and a marker, then numbers of places in random order, each of which asks for its symbol. MAD
  decodes them from the last token by a network of its own; here the model itself answers, so that a model's state is
  tested, and of attention nothing.
- `memorise`: keys and a marker after each, which asks for the value; the values belong to the seed, so that no row
  shows them, and they must be learned by weights.

Unlike MAD, which trains on all tokens, only answers count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hopescale.suites.task import Example, Fault, Settings, Task, blank


def noisy_recall(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw pairs with one value for each key, and noise between them. The first pair is never noise."""
    half = settings["num_symbols"] // 2
    count = length // 2
    tokens, answers = blank(length, 4 * half)
    keys, of_key = generator.integers(half, size=count), half + generator.integers(half, size=half)
    noisy = generator.random(count) < settings["noise"]
    noisy[0], keys[-1], noisy[-1] = False, keys[0], False
    pairs = np.stack([keys, of_key[keys]], axis=1)
    pairs[noisy] = 2 * half + generator.integers(2 * half, size=(int(noisy.sum()), 2))
    tokens[: 2 * count] = pairs.ravel()
    seen: set[int] = set()
    for place in np.flatnonzero(~noisy):
        if keys[place] in seen:
            answers[2 * place] = pairs[place, 1]
        seen.add(int(keys[place]))
    return Example(tokens, answers)


def values_so_far(example: Example, settings: Settings) -> np.ndarray:
    """Count the values that pairs have shown until each place."""
    half = settings["num_symbols"] // 2
    shown: set[int] = set()
    counts = np.zeros(len(example.tokens), np.int64)
    for place, token in enumerate(example.tokens):
        if half <= token < 2 * half:
            shown.add(int(token))
        counts[place] = len(shown)
    return counts


def fuzzy_recall(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw pairs of a key and a value of one to `value_length` tokens each; the second pair repeats the first."""
    half, longest = settings["num_symbols"] // 2, settings["value_length"]
    drawn = [tuple(generator.integers(half, size=generator.integers(1, longest + 1)).tolist()) for _ in range(half)]
    values = {key: half + generator.integers(half, size=generator.integers(1, longest + 1)) for key in drawn}
    keys, seen = list(values), set()
    tokens, answers = blank(length, 2 * half)
    key, place = keys[0], 0
    while (end := place + len(key) + len(values[key])) <= length:
        middle = place + len(key)
        tokens[place:middle], tokens[middle:end] = key, values[key]
        if key in seen:
            answers[middle - 1 : end - 1] = values[key]
        seen.add(key)
        key = keys[generator.integers(len(keys))] if place else key
        place = end
    return Example(tokens, answers)


def selective_copy(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw symbols and their places among blanks."""
    symbols, count = settings["num_symbols"], settings["num_pairs"]
    tokens, answers = blank(length, symbols + 1)
    copied = generator.integers(symbols, size=count)
    marker = length - count
    tokens[np.sort(generator.choice(marker, size=count, replace=False))] = copied
    tokens[marker] = symbols
    answers[marker : marker + count] = copied
    return Example(tokens, answers)


def compress(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw symbols, and the order in which places are asked."""
    symbols, count = settings["num_symbols"], settings["num_pairs"]
    tokens, answers = blank(length, symbols + count + 1)
    tokens[:count], order = generator.integers(symbols, size=count), generator.permutation(count)
    tokens[count] = symbols + count
    asked = order[: length - count - 1]
    tokens[count + 1 : count + 1 + len(asked)] = symbols + asked
    answers[count + 1 : count + 1 + len(asked)] = tokens[asked]
    return Example(tokens, answers)


def memorise(generator: np.random.Generator, length: int, settings: Settings, table: np.ndarray) -> Example:
    """Draw keys; `table` has the value of each. Shape `[num_symbols // 2]`."""
    tokens, answers = blank(length, settings["num_symbols"])
    keys = generator.integers(len(table), size=length // 2)
    tokens[: 2 * len(keys) : 2] = keys
    answers[1 : 2 * len(keys) : 2] = table[keys]
    return Example(tokens, answers)


def _values_of_keys(generator: np.random.Generator, settings: Settings) -> np.ndarray:
    half = settings["num_symbols"] // 2
    return half + generator.permutation(half)


def _enough_symbols(settings: Settings) -> Iterator[Fault]:
    if settings["num_symbols"] < 4:
        yield "num_symbols", f"{settings['num_symbols']} are not two keys and two values; at least 4"


def _half(settings: Settings) -> float:
    return 1 / (settings["num_symbols"] // 2)


SOURCE = "MAD, 2403.17844"
TASKS = {
    "noisy_recall": Task(
        make=noisy_recall,
        asks="the value of a key that has come before, among noise",
        source=SOURCE,
        num_ids=lambda settings: 4 * (settings["num_symbols"] // 2) + 1,
        chance=None,
        choices=values_so_far,
        shortest=lambda settings: 4,
        defaults={"num_symbols": 16, "noise": 0.2},
        faults=_enough_symbols,
    ),
    "fuzzy_recall": Task(
        make=fuzzy_recall,
        asks="the value, of several tokens, of a key of several tokens that has come before",
        source=SOURCE,
        num_ids=lambda settings: 2 * (settings["num_symbols"] // 2) + 1,
        chance=None,
        shortest=lambda settings: 4 * settings["value_length"],
        defaults={"num_symbols": 16, "value_length": 3},
        faults=_enough_symbols,
    ),
    "selective_copy": Task(
        make=selective_copy,
        asks="symbols among blanks, in their order",
        source=SOURCE,
        num_ids=lambda settings: settings["num_symbols"] + 2,
        chance=lambda settings: 1 / settings["num_symbols"],
        shortest=lambda settings: 2 * settings["num_pairs"],
        defaults={"num_symbols": 16, "num_pairs": 16},
    ),
    "compress": Task(
        make=compress,
        asks="the symbol at a place of the row, by the place's number",
        source=f"{SOURCE}, asked of the model itself",
        num_ids=lambda settings: settings["num_symbols"] + settings["num_pairs"] + 2,
        chance=lambda settings: 1 / settings["num_symbols"],
        shortest=lambda settings: settings["num_pairs"] + 2,
        defaults={"num_symbols": 16, "num_pairs": 16},
    ),
    "memorise": Task(
        make=memorise,
        asks="the value of a key that no row shows",
        source=SOURCE,
        num_ids=lambda settings: settings["num_symbols"] + 1,
        chance=_half,
        shortest=lambda settings: 2,
        defaults={"num_symbols": 256},
        table=_values_of_keys,
        faults=_enough_symbols,
    ),
}
