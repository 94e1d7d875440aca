"""A small language of words, in which needles and facts are hidden: sentences about the weather, animals and houses.

A lexicon gives every word an id. A model that was trained on a suite reads ids; one that was trained on text reads the
words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ADJECTIVES = ("old", "small", "red", "quiet", "tall", "cold", "round", "empty")
NOUNS = ("house", "river", "horse", "bird", "cloud", "road", "tree", "boat", "stone", "field", "lamp", "wall")
VERBS = ("passes", "touches", "follows", "meets", "covers", "leaves")
REPEATED = ("the", "river", "passes", "the", "old", "house", ".")
"""Sentence of a haystack that says one thing over and over."""
WORDS = (".", "the", "a", *ADJECTIVES, *NOUNS, *VERBS)
"""All words of the prose; their ids are their places here."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_ID = {word: number for number, word in enumerate(WORDS)}
LONGEST = 8
"""Words of the longest sentence, its full stop counted."""


def name(number: int) -> str:
    """Return a made-up name of three syllables, another one for each number below a million."""
    syllables = []
    for _ in range(3):
        number, rest = divmod(number, len(_CONSONANTS) * len(_VOWELS))
        syllables.append(_CONSONANTS[rest // len(_VOWELS)] + _VOWELS[rest % len(_VOWELS)])
    return "".join(syllables).capitalize()


def text_of(words: Sequence[str]) -> str:
    """Join words with spaces, digits to numbers, and full stops to the word before them."""
    text = ""
    for before, word in zip(("", *words), words, strict=False):
        joined = not text or word == "." or (before.isdigit() and word.isdigit())
        text += word if joined else f" {word}"
    return text


def spelled(*words: str) -> list[int]:
    """Return the ids of words."""
    return [_ID[word] for word in words]


def repeated() -> list[int]:
    """Return the one sentence of a repeating haystack."""
    return spelled(*REPEATED)


def sentence(generator: np.random.Generator) -> list[int]:
    """Draw a sentence of six to eight words: article, adjective or none, noun, verb, and the same to a full stop."""
    words: list[str] = []
    for ending in (VERBS, (".",)):
        words.append(("the", "a")[generator.integers(2)])
        if generator.integers(2):
            words.append(ADJECTIVES[generator.integers(len(ADJECTIVES))])
        words.append(NOUNS[generator.integers(len(NOUNS))])
        words.append(ending[generator.integers(len(ending))])
    return spelled(*words)


def hide(
    generator: np.random.Generator,
    told: Sequence[Sequence[int]],
    room: int,
    *,
    distance: int | None,
    haystack: str,
) -> list[int]:
    """Put sentences that matter into a text of at most `room` words that do not, in their order.

    Args:
        generator: Source of chance.
        told: Sentences that matter.
        room: Most words of the whole, those of `told` among them.
        distance: Words after the last sentence that matters, up to one sentence; None puts it anywhere.
        haystack: Kind of the text: `prose`, or `repeat` for one sentence.
    """
    room -= sum(map(len, told))
    text: list[list[int]] = []
    used = 0
    while True:
        new = repeated() if haystack == "repeat" else sentence(generator)
        if used + len(new) > room:
            break
        text.append(new)
        used += len(new)
    last = len(text)
    if distance is not None:
        after = 0
        while last and after < distance:
            last -= 1
            after += len(text[last])
    places = np.sort(generator.integers(last + 1, size=len(told)))
    if distance is not None:
        places[-1] = last
    for place, one in zip(places[::-1], told[::-1], strict=True):
        text.insert(int(place), list(one))
    return [word for one in text for word in one]
