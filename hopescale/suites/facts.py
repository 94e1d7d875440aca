"""Facts scattered over a long text (BABILong, arXiv 2406.10149, after tasks 1 and 2 of bAbI, arXiv 1502.05698).

People go to places and take things; the sentences lie in their order in a text that has nothing to do with them. At the
end it is asked where somebody is (one hop), or where a thing is, which is where the person is who took it last (two
hops): `NOW SOMEBODY IS_AT`. With a `distance` it is the last of these sentences that is asked about. Ids are those of
the prose, then these words, people, places and things.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hopescale.suites import prose
from hopescale.suites.task import Example, Settings, Task, blank

WENT, TOOK, NOW, IS_AT = range(len(prose.WORDS), len(prose.WORDS) + 4)
FIRST_PERSON = IS_AT + 1
WORDS_OF_A_FACT, WORDS_OF_A_QUESTION = 4, 3


def make(generator: np.random.Generator, length: int, settings: Settings, table: Any) -> Example:
    """Draw facts and the text around them."""
    size, hops, count = settings["num_symbols"], settings["num_hops"], settings["num_pairs"]
    is_placed = settings["distance"] is not None
    people, places, things = (FIRST_PERSON + kind * size for kind in range(3))
    where: dict[int, int] = {}
    holder: dict[int, int] = {}
    told = []
    for number in range(count):
        if number and hops == 2 and (number == 1 or (is_placed and number == count - 1) or generator.integers(2)):
            person = list(where)[generator.integers(len(where))]
            thing = things + int(generator.integers(size))
            holder[thing] = person
            told.append([person, TOOK, thing, *prose.spelled(".")])
        else:
            person = people + int(generator.integers(size))
            where[person] = places + int(generator.integers(size))
            told.append([person, WENT, where[person], *prose.spelled(".")])
    known = list(where) if hops == 1 else list(holder)
    asked = told[-1][2 * (hops - 1)] if is_placed else known[generator.integers(len(known))]
    room = length - WORDS_OF_A_QUESTION
    row = prose.hide(generator, told, room, distance=settings["distance"], haystack="prose")
    row += [NOW, asked, IS_AT]
    tokens, answers = blank(length, _num_ids(settings) - 1)
    tokens[: len(row)] = row
    answers[len(row) - 1] = where[asked if hops == 1 else holder[asked]]
    return Example(tokens, answers)


def choices(example: Example, settings: Settings) -> np.ndarray:
    """Count the places that a row names."""
    first = FIRST_PERSON + settings["num_symbols"]
    named = {int(word) for word in example.tokens if first <= word < first + settings["num_symbols"]}
    return np.full(len(example.tokens), len(named))


def spell(word: int, settings: Settings) -> str:
    """Return the word of an id; people, places and things have made-up names."""
    if word < len(prose.WORDS):
        return prose.WORDS[word]
    if word < FIRST_PERSON:
        return ("went to", "took", "Now", "is at")[word - WENT]
    return prose.name(word - FIRST_PERSON)


def _num_ids(settings: Settings) -> int:
    return FIRST_PERSON + 3 * settings["num_symbols"] + 1


def _shortest(settings: Settings) -> int:
    facts = WORDS_OF_A_FACT * settings["num_pairs"] + (settings["distance"] or 0)
    return facts + 2 * prose.LONGEST + WORDS_OF_A_QUESTION


def _enough_facts(settings: Settings):
    if settings["num_pairs"] < settings["num_hops"]:
        yield "num_pairs", f"{settings['num_pairs']} fact is too few for num_hops = {settings['num_hops']}"


TASKS = {
    "facts": Task(
        make=make,
        asks="where somebody, or what somebody carries, is at last",
        source="BABILong, 2406.10149",
        num_ids=_num_ids,
        chance=None,
        choices=choices,
        shortest=_shortest,
        defaults={"num_symbols": 6, "num_pairs": 6, "num_hops": 1, "distance": None},
        faults=_enough_facts,
        spell=spell,
    )
}
