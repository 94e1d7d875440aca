"""Answers of every task against a solver that reads the row and knows nothing of how it was made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import get_args, get_type_hints

import numpy as np
import pytest

from hopescale.config.schema import SuiteConfig
from hopescale.suites import classes, facts, needles, prose, two_languages
from hopescale.suites.registry import GROUPS, TASKS, Generated, num_ids, problems, resolve
from hopescale.suites.task import NOT_ASKED

Row = list[int]
Answers = dict[int, int]
"""What must be said, by place."""


def mqar(row: Row, config: SuiteConfig, table: object) -> Answers:
    values = dict(zip(row[0:8:2], row[1:8:2], strict=True))
    return {place: values[token] for place, token in enumerate(row) if place >= 8 and token in values}


def pairs_seen(row: Row, config: SuiteConfig, table: object) -> Answers:
    """Keys of up to `value_length` tokens below 8, values of tokens from 8 to 15, other tokens are noise."""
    kinds = "".join("k" if token < 8 else "v" if token < 16 else "n" for token in row)
    values: dict[tuple[int, ...], Row] = {}
    found, place = {}, 0
    while place < len(row):
        if kinds[place] != "k":
            place += 1
            continue
        middle = next(at for at in range(place, len(row)) if kinds[at] != "k")
        end = next((at for at in range(middle, len(row)) if kinds[at] != "v"), len(row))
        key = tuple(row[place:middle])
        if key in values:
            found |= {middle - 1 + number: value for number, value in enumerate(values[key])}
        values.setdefault(key, row[middle:end])
        assert values[key] == row[middle:end]
        place = end
    return found


def selective_copy(row: Row, config: SuiteConfig, table: object) -> Answers:
    marker = row.index(16)
    return dict(enumerate([token for token in row[:marker] if token != 17], start=marker))


def compress(row: Row, config: SuiteConfig, table: object) -> Answers:
    marker = row.index(16 + 6)
    return {place: row[row[place] - 16] for place in range(marker + 1, len(row)) if row[place] < 22}


def memorise(row: Row, config: SuiteConfig, table: object) -> Answers:
    return {place: int(table[row[place - 1]]) for place in range(1, len(row), 2)}


def parity(row: Row, config: SuiteConfig, table: object) -> Answers:
    return {place: row[: place + 1].count(1) % 2 for place in range(len(row))}


WORDS: dict[str, Callable[[str], bool]] = {
    "aa": lambda text: len(text) % 2 == 0 and set(text) <= {"a"},
    "abab": lambda text: text == "abab" * (len(text) // 4),
    "anbn": lambda text: text == "a" * text.count("a") + "b" * text.count("a"),
    "anbncn": lambda text: text == "".join(letter * text.count("a") for letter in "abc"),
    "shuffle2": lambda text: all(closed(text, *pair) for pair in ("()", "[]")),
}
"""Whether a text is in a language."""
LETTERS = {"aa": "a", "abab": "ab", "anbn": "ab", "anbncn": "abc", "shuffle2": "()[]"}
ANSWERS = {
    "aa": ("a.", "a"),
    "abab": ("a.", "b", "a"),
    "anbn": ("ab", "b", "."),
    "anbncn": ("ab", "b", "c", "."),
    "shuffle2": (".([", ")([", "]([", ")(]["),
}
"""Symbols that may follow, the end as a full stop, in the order of the ids after those of the letters."""


def closed(text: str, opens: str, closes: str) -> bool:
    depths = np.cumsum([(letter == opens) - (letter == closes) for letter in text])
    return len(depths) == 0 or (depths.min() >= 0 and depths[-1] == 0)


def endings(task: str, text: str) -> Iterator[str]:
    """List continuations of which one completes a text, if any does: so many of each letter as there are now."""
    if task == "shuffle2":
        yield "".join(c * max(0, text.count(o) - text.count(c)) for o, c in ("()", "[]"))
    elif task in ("anbn", "anbncn"):
        letters = LETTERS[task]
        for more in (0, 1):
            count = text.count("a") + more
            yield "".join(letter * (count - text.count(letter)) for letter in letters)
    else:
        yield from ((LETTERS[task] * 4)[len(text) % 4 :][:size] for size in range(5))


def formal(task: str) -> Callable[..., Answers]:
    """Return a solver that tries every letter, and looks for an end that makes a word of the language."""

    def solve(row: Row, config: SuiteConfig, table: object) -> Answers:
        letters, found = LETTERS[task], {}
        text = "".join(letters[token] for token in row if token < len(letters))
        for place in range(len(text)):
            begun = text[: place + 1]
            follow = {letter for letter in letters if can_end(task, begun + letter)}
            follow |= {"."} if WORDS[task](begun) else set()
            found[place] = len(letters) + [set(answer) for answer in ANSWERS[task]].index(follow)
        return found

    return solve


def can_end(task: str, text: str) -> bool:
    if task == "shuffle2":
        heads = range(len(text) + 1)
        return all(text[:n].count(o) >= text[:n].count(c) for n in heads for o, c in ("()", "[]"))
    return any(WORDS[task](text + more) for more in endings(task, text))


def modular_sum(row: Row, config: SuiteConfig, table: object) -> Answers:
    return {place: sum(row[: place + 1]) % 5 for place in range(len(row))}


def products(row: Row, config: SuiteConfig, table: object) -> Answers:
    group, found, state = list(permutations(range(4))), {}, [0, 1, 2, 3]
    for place, token in enumerate(row):
        assert sum(number != moved for number, moved in enumerate(group[token])) in (0, 2)
        state = [group[token][number] for number in state]
        found[place] = group.index(tuple(state))
    return found


def needle(row: Row, config: SuiteConfig, table: object) -> Answers:
    size, first = config.value_length, row.index(needles.ASKS)
    values: dict[int, Row] = {}
    for place in range(first):
        if row[place] == needles.HOLDS:
            values.setdefault(row[place - 1], []).extend(row[place + 1 : place + 1 + size])
            assert row[place + 1 + size] == prose.WORDS.index(".")
    found, left = {}, []
    for place in range(first, len(row)):
        if row[place] == needles.HOLDS:
            left = values[row[place - 1]]
        if row[place] in (needles.HOLDS, needles.AND):
            found |= dict(enumerate(left[:size], start=place))
            left = left[size:]
    return found


def fact(row: Row, config: SuiteConfig, table: object) -> Answers:
    at: dict[int, int] = {}
    last = row.index(facts.NOW)
    for place in range(1, last):
        if row[place] == facts.WENT:
            at[row[place - 1]] = row[place + 1]
        elif row[place] == facts.TOOK:
            at[row[place + 1]] = row[place - 1]
    answer = row[last + 1]
    while answer in at:
        answer = at[answer]
    return {last + 2: answer}


def topics(row: Row, config: SuiteConfig, table: object) -> Answers:
    filling, labels, found = num_ids(config) - 1, {}, {}
    for begin in range(0, len(row) - 4, 5):
        (topic,) = {(word - classes.COMMON) // 4 for word in row[begin : begin + 4] if word >= classes.COMMON}
        label = row[begin + 4]
        if label == filling:
            found[begin + 3] = labels[topic]
        else:
            assert labels.setdefault(topic, label) == label
    return found


def next_words(row: Row, config: SuiteConfig, table: object) -> Answers:
    filling = num_ids(config) - 1
    return {place: row[place + 1] for place in range(len(row) - 1) if row[place + 1] != filling}


def translated(row: Row, config: SuiteConfig, table: two_languages.Languages) -> Answers:
    size, found = 16, {}
    one = 2 * size + 4
    for sign in (place for place, word in enumerate(row) if word == 3 * one - 4 + 1):
        language, said = row[sign - 1] // one, row[sign - 6 : sign]
        first, second, verb = (0, 2, 4) if language == 0 else (1, 3, 0)
        subject, thing = (table.nouns[language].tolist().index(said[at]) for at in (first, second))
        doing = table.verbs[language].tolist().index(said[verb])
        genders = [said[at + 1] - one * language - 2 * size for at in (first, second)]
        assert genders == table.genders[language][[subject, thing]].tolist()
        assert said[5] - one * language - 2 * size - 2 == genders[0]
        found |= dict(enumerate((2 * one + subject, 2 * one + size + doing, 2 * one + thing), start=sign))
    return found


CASES: dict[str, tuple[Callable[..., Answers], dict[str, object], int]] = {
    "mqar": (mqar, {"num_pairs": 4, "distance": 3}, 31),
    "noisy_recall": (pairs_seen, {"noise": 0.4}, 51),
    "fuzzy_recall": (pairs_seen, {}, 60),
    "selective_copy": (selective_copy, {"num_pairs": 5}, 23),
    "compress": (compress, {"num_pairs": 6}, 12),
    "memorise": (memorise, {"num_symbols": 20}, 8),
    "parity": (parity, {}, 17),
    **{name: (formal(name), {}, 24) for name in WORDS},
    "modular_sum": (modular_sum, {}, 17),
    "permutations": (products, {"num_symbols": 4, "num_moved": 2}, 17),
    "needle_single_1": (needle, {"value_length": 2}, 50),
    "needle_single_2": (needle, {"value_length": 2, "distance": 20}, 70),
    "needle_single_3": (needle, {"value_length": 9}, 70),
    "needle_multikey": (needle, {"value_length": 1, "num_pairs": 3}, 60),
    "needle_multivalue": (needle, {"value_length": 2, "num_pairs": 3}, 60),
    "needle_multiquery": (needle, {"value_length": 2, "num_pairs": 3}, 70),
    "facts": (fact, {"num_hops": 2, "distance": 10}, 70),
    "classes": (topics, {}, 83),
    "continuation": (next_words, {"language": "first"}, 40),
    "translation": (translated, {}, 45),
}
NUM_EXAMPLES = 25
ALIKE = ("aa", "abab", "anbn", "anbncn", "shuffle2", "parity", "modular_sum")
"""Tasks whose shortest examples may be equal by chance."""


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_an_independent_solver(name: str):
    solve, settings, length = CASES[name]
    config = SuiteConfig(task=name, **settings)
    assert problems(config, seq_len=length, vocab_size=num_ids(config)) == []
    made = Generated(config, seed=3, length=length)
    asked = 0
    for example in made.examples("train", range(NUM_EXAMPLES), seed=3):
        tokens, answers = example.tokens.tolist(), example.answers.tolist()
        assert len(tokens) == len(answers) == length
        assert min(tokens) >= 0 and max(tokens + answers) < num_ids(config)
        found = solve(tokens, config, made.table)
        assert {place: answer for place, answer in enumerate(answers) if answer != NOT_ASKED} == found
        asked += len(found)
    assert asked >= NUM_EXAMPLES


@pytest.mark.parametrize("name", TASKS)
def test_the_shortest_length_suffices_and_examples_are_those_of_their_number(name: str):
    config = SuiteConfig(task=name)
    made = Generated(config, seed=0, length=TASKS[name].shortest(resolve(config)))
    first, *_ = made.examples("train", [7, 8], seed=0)
    (again,), (other,) = made.examples("train", [7], seed=0), made.examples("test", [7], seed=0)
    assert (first.tokens == again.tokens).all() and (first.answers != NOT_ASKED).any()
    if name not in ALIKE:
        assert first.tokens.tolist() != other.tokens.tolist()


def test_the_schema_names_the_tasks_and_groups_hold_tasks():
    assert set(get_args(get_type_hints(SuiteConfig)["task"])) == set(TASKS) == set(CASES)
    assert all(name in TASKS for names in GROUPS.values() for name in names)
    settings = {name for task in TASKS.values() for name in task.defaults}
    assert settings | {"task", "length", "num_samples"} == set(get_type_hints(SuiteConfig))


@pytest.mark.parametrize("language", two_languages.NAMES)
def test_of_seven_words_three_cannot_be_foreseen(language: str):
    """Two nouns and a verb are free; articles and the ending follow, as the solver of translations asserts."""
    made = Generated(SuiteConfig(task="continuation", language=language), seed=0, length=71)
    answers = np.stack([example.answers[:70] for example in made.examples("train", range(60), seed=0)])
    sizes = sorted(len(set(answers[:, slot::7].ravel().tolist())) for slot in range(7))
    assert sizes == [1, 2, 2, 2, 16, 16, 16]
    assert TASKS["continuation"].best({"num_symbols": 16}) == pytest.approx((4 + 3 / 16) / 7)


@pytest.mark.parametrize(
    ("settings", "length", "said"),
    [
        ({"task": "parity", "num_pairs": 3}, 8, ("num_pairs", "no effect")),
        ({"task": "mqar", "num_pairs": 40}, 200, ("num_pairs", "half of num_symbols")),
        ({"task": "mqar"}, 31, ("task", "needs 32 tokens, an example has 31")),
        ({"task": "mqar", "length": 64}, 32, ("length", "exceeds train.seq_len = 32")),
        ({"task": "permutations"}, 16, ("task", "121 symbols")),
        ({"task": "permutations", "num_symbols": 7}, 16, ("num_symbols", "at most 6")),
        ({"task": "classes", "num_sessions": 3}, 90, ("num_sessions", "evenly")),
        ({"task": "needle_multikey", "num_symbols": 2}, 90, ("num_pairs", "as many keys")),
        ({"task": "facts", "num_pairs": 1, "num_hops": 2}, 90, ("num_pairs", "too few")),
        ({"task": "memorise", "num_symbols": 3}, 90, ("num_symbols", "at least 4")),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, length, said):
    ((key, message),) = problems(SuiteConfig(**settings), seq_len=length, vocab_size=100)
    assert key == said[0] and said[1] in message


def test_words_are_spelled_as_one_would_write_them():
    needle, fact = TASKS["needle_multivalue"], TASKS["facts"]
    made = Generated(SuiteConfig(task="needle_multivalue", value_length=2, num_pairs=2), seed=0, length=40)
    (example,) = made.examples("test", [0], seed=0)
    text = prose.text_of([needle.spell(int(word), made.settings) for word in example.tokens[:-1]])
    assert re.search(r"Remember: (\w+) holds (\d\d) and (\d\d)\b", text)
    key, first, second = re.search(r"Remember: (\w+) holds (\d\d) and (\d\d)\b", text).groups()
    assert re.findall(rf"{key} holds (\d\d)\.", text) == [first, second]
    assert [fact.spell(facts.WENT + number, {}) for number in range(4)] == ["went to", "took", "Now", "is at"]
    assert len({prose.name(number) for number in range(1000)}) == 1000


@pytest.mark.parametrize("haystack", ["needle_single_1", "needle_multikey"])
def test_a_distance_holds_up_to_a_sentence_and_null_varies_it(haystack: str):
    gaps: dict[int | None, list[int]] = {None: [], 20: []}
    for distance, found in gaps.items():
        made = Generated(SuiteConfig(task=haystack, distance=distance), seed=0, length=120)
        for example in made.examples("test", range(15), seed=0):
            row = example.tokens.tolist()
            question = row.index(needles.ASKS)
            told = next(
                place for place in range(question) if row[place : place + 2] == row[question + 1 : question + 3]
            )
            found.append(question - (told + 2 + made.settings["value_length"] + 1))
    assert all(20 <= gap < 20 + prose.LONGEST for gap in gaps[20])
    assert max(gaps[None]) - min(gaps[None]) > 40


@pytest.mark.parametrize("hops", [1, 2])
def test_the_fact_that_is_asked_about_lies_at_the_distance(hops: int):
    made = Generated(SuiteConfig(task="facts", num_hops=hops, distance=20), seed=0, length=120)
    for example in made.examples("test", range(15), seed=0):
        row = example.tokens.tolist()
        question = row.index(facts.NOW)
        told = max(place for place in range(question) if row[place] in (facts.WENT, facts.TOOK))
        assert row[question + 1] == row[told - 1 if hops == 1 else told + 1]
        assert 20 <= question - (told + 3) < 20 + prose.LONGEST


@pytest.mark.parametrize("name", ["facts", "noisy_recall"])
def test_a_guess_is_among_the_answers_that_a_row_allows(name: str):
    """Whoever guesses among them is right as often as chance says, within four standard errors."""
    config = SuiteConfig(task=name, **({"num_pairs": 3} if name == "facts" else {"num_symbols": 8}))
    made, generator, hits, chances = Generated(config, seed=0, length=60), np.random.default_rng(0), [], []
    for example in made.examples("test", range(60), seed=0):
        tokens, answers = example.tokens, example.answers
        for place in np.flatnonzero(answers != NOT_ASKED):
            if name == "facts":
                first = facts.FIRST_PERSON + 6
                allowed = sorted({int(word) for word in tokens if first <= word < first + 6})
            else:
                allowed = sorted({int(word) for word in tokens[: place + 1] if 4 <= word < 8})
            assert int(answers[place]) in allowed
            hits.append(allowed[generator.integers(len(allowed))] == answers[place])
            chances.append(1 / TASKS[name].choices(example, made.settings)[place])
    assert np.allclose(np.mean(hits), np.mean(chances), atol=4 * 0.5 / len(hits) ** 0.5)
    assert np.mean(chances) > (1 / 6 if name == "facts" else 1 / 4) + 0.02
