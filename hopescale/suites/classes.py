"""Class-incremental text classification, within a context (as of Nested Learning, arXiv 2512.24695, Section 9.1).

The paper's model reads labelled texts of CLINC, Banking and DBpedia, session by session, each with classes of its own,
and must then tell all classes apart. Here a class is a topic: half of a text's words are of the topic's own, and half
are common words. Sessions show texts of their classes with the label behind each; then come texts of all classes, whose
labels are asked. A row gives topics new labels, so that labels must be learned while reading. Labels of early sessions
that are lost show as forgetting.

Ids: common words, the words of each topic, labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hopescale.suites.task import NOT_ASKED, Example, Fault, Settings, Task, blank

COMMON = 16
OF_A_TOPIC = 4
"""Words of a topic's own."""
TEXT = 4
"""Words of a text."""
SHOTS = 2
"""Texts of each class in its session."""


def make(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw topics, their labels and texts."""
    topics, classes, sessions = settings["num_symbols"], settings["num_pairs"], settings["num_sessions"]
    labels_at = COMMON + OF_A_TOPIC * topics
    chosen, labels = generator.permutation(topics)[:classes], labels_at + generator.permutation(classes)
    shown = [generator.permutation(np.repeat(part, SHOTS)) for part in np.split(np.arange(classes), sessions)]
    num_shown = SHOTS * classes
    num_asked = length // (TEXT + 1) - num_shown
    rounds = -(-num_asked // classes)
    asked = np.concatenate([generator.permutation(classes) for _ in range(rounds)])[:num_asked]
    order = np.concatenate([*shown, asked])
    own = COMMON + OF_A_TOPIC * chosen[order][:, None] + generator.integers(OF_A_TOPIC, size=(len(order), TEXT // 2))
    words = np.concatenate([own, generator.integers(COMMON, size=(len(order), TEXT - TEXT // 2))], axis=1)
    rows = np.concatenate([generator.permuted(words, axis=1), labels[order][:, None]], axis=1)
    wanted = np.full(rows.shape, NOT_ASKED)
    wanted[num_shown:, TEXT - 1] = labels[asked]
    rows[num_shown:, TEXT] = _num_ids(settings) - 1
    tokens, answers = blank(length, _num_ids(settings) - 1)
    tokens[: rows.size], answers[: rows.size] = rows.ravel(), wanted.ravel()
    return Example(tokens, answers)


def _num_ids(settings: Settings) -> int:
    return COMMON + OF_A_TOPIC * settings["num_symbols"] + settings["num_pairs"] + 1


def _faults(settings: Settings) -> Iterator[Fault]:
    classes, sessions, topics = settings["num_pairs"], settings["num_sessions"], settings["num_symbols"]
    if classes > topics:
        yield "num_pairs", f"{classes} classes need as many topics, num_symbols is {topics}"
    if classes % sessions:
        yield "num_sessions", f"{sessions} sessions do not share num_pairs = {classes} classes evenly"


TASKS = {
    "classes": Task(
        make=make,
        asks="the class of a text, of all classes that sessions have introduced",
        source="Nested Learning, 2512.24695, Section 9.1",
        num_ids=_num_ids,
        chance=lambda settings: 1 / settings["num_pairs"],
        shortest=lambda settings: (TEXT + 1) * (SHOTS + 1) * settings["num_pairs"],
        defaults={"num_symbols": 16, "num_pairs": 4, "num_sessions": 2},
        faults=_faults,
    )
}
