"""Two languages, one learned after the other (as continual translation of Nested Learning, arXiv 2512.24695, 9.1).

The paper's model learns to translate Manchu, and then Kalamang; what is left of the first is forgetting. Here both
languages are grammars whose words are drawn from the seed, so that they must be learned by weights:

- A sentence says that somebody does something to somebody: two nouns and a verb of `num_symbols` each.
- Both nouns are followed by an article of their gender, the verb by an ending of the subject's gender. Which gender a
  noun has differs between the languages.
- The first language says subject, object, verb, ending, and the second verb, subject, object, ending. The mother
  tongue, into which both are translated, says subject, verb, object, and has neither articles nor endings.

`continuation` asks for all next words of a text; nouns and verbs cannot be foreseen, so the best score is below 1.
`translation` shows a sentence and asks for the same in the mother tongue.

Ids: of each language nouns, verbs, two articles, two endings; of the mother tongue nouns and verbs; the end of a
sentence, the sign of a translation, the filling.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hopescale.suites.task import Example, Settings, Task, blank

NAMES = ("first", "second")
WORDS = 7
"""Words of a sentence of a language, its end counted."""
PAIR = WORDS + 3
"""Words of a sentence and its translation."""
ORDERS = ((0, 1, 2, 3, 4, 5), (4, 0, 1, 2, 3, 5))
"""Places of subject, its article, object, its article, verb and ending, by language."""


class Languages(NamedTuple):
    """Two languages: for each meaning the word."""

    nouns: np.ndarray
    """Ids. Shape `[2, n]`."""
    verbs: np.ndarray
    """Ids. Shape `[2, n]`."""
    genders: np.ndarray
    """0 or 1. Shape `[2, n]`."""


def draw_languages(generator: np.random.Generator, settings: Settings) -> Languages:
    """Draw words and genders."""
    size = settings["num_symbols"]
    begin = _words_of_one(settings) * np.arange(2)[:, None]
    nouns, verbs = (np.stack([generator.permutation(size) for _ in NAMES]) for _ in range(2))
    genders = np.stack([generator.permutation(size) % 2 for _ in NAMES])
    return Languages(begin + nouns, begin + size + verbs, genders)


def continuation(generator: np.random.Generator, length: int, settings: Settings, table: Languages) -> Example:
    """Draw sentences of one language, behind the end of another sentence."""
    count = (length - 1) // WORDS
    tokens, answers = blank(length, _num_ids(settings) - 1)
    text = _sentences(table, _language(generator, settings), _meanings(generator, count, settings), settings)
    tokens[0], tokens[1 : 1 + text.size] = _end(settings), text.ravel()
    answers[: text.size] = text.ravel()
    return Example(tokens, answers)


def translation(generator: np.random.Generator, length: int, settings: Settings, table: Languages) -> Example:
    """Draw sentences of one language, each with its translation."""
    count = length // PAIR
    meanings = _meanings(generator, count, settings)
    text = _sentences(table, _language(generator, settings), meanings, settings)
    text[:, -1] = _end(settings) + 1
    mother = 2 * _words_of_one(settings) + meanings[:, [0, 2, 1]] + [0, settings["num_symbols"], 0]
    tokens, answers = blank(length, _num_ids(settings) - 1)
    row = np.concatenate([text, mother], axis=1)
    tokens[: row.size] = row.ravel()
    answers[: row.size].reshape(row.shape)[:, WORDS - 1 : -1] = mother
    return Example(tokens, answers)


def _meanings(generator: np.random.Generator, count: int, settings: Settings) -> np.ndarray:
    """Draw subjects, objects and verbs. Shape `[count, 3]`."""
    return generator.integers(settings["num_symbols"], size=(count, 3))


def _sentences(table: Languages, language: int, meanings: np.ndarray, settings: Settings) -> np.ndarray:
    """Say meanings in a language. Shape `[count, WORDS]`."""
    particles = _words_of_one(settings) * language + 2 * settings["num_symbols"]
    nouns, genders = table.nouns[language][meanings[:, :2]], table.genders[language][meanings[:, :2]]
    verbs = table.verbs[language][meanings[:, 2]]
    articles = particles + genders
    parts = (nouns[:, 0], articles[:, 0], nouns[:, 1], articles[:, 1], verbs, particles + 2 + genders[:, 0])
    ends = np.full(len(meanings), _end(settings))
    return np.stack([*(parts[place] for place in ORDERS[language]), ends], axis=1)


def _language(generator: np.random.Generator, settings: Settings) -> int:
    return int(generator.integers(2)) if settings["language"] == "both" else NAMES.index(settings["language"])


def _words_of_one(settings: Settings) -> int:
    return 2 * settings["num_symbols"] + 4


def _end(settings: Settings) -> int:
    return 2 * _words_of_one(settings) + 2 * settings["num_symbols"]


def _num_ids(settings: Settings) -> int:
    return _end(settings) + 3


SOURCE = "Nested Learning, 2512.24695, Section 9.1"
TASKS = {
    "continuation": Task(
        make=continuation,
        asks="every next word of a text in one of two languages",
        source=SOURCE,
        num_ids=_num_ids,
        chance=None,
        shortest=lambda settings: 1 + WORDS,
        defaults={"num_symbols": 16, "language": "both"},
        table=draw_languages,
        best=lambda settings: (WORDS - 3 + 3 / settings["num_symbols"]) / WORDS,
    ),
    "translation": Task(
        make=translation,
        asks="the words of a sentence in the mother tongue",
        source=SOURCE,
        num_ids=_num_ids,
        chance=lambda settings: 1 / settings["num_symbols"],
        shortest=lambda settings: PAIR,
        defaults={"num_symbols": 16, "language": "both"},
        table=draw_languages,
    ),
}
