"""What is asked of a model by a generated suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hopescale.config.schema.ranges import Count, CountOrZero, FractionOrZero, NumberRange


@dataclass(frozen=True)
class SuiteConfig:
    """A task of `hopescale.suites`: needs no files and no tokenizer. Sample `i` is a pure function of (seed, split, i).

    A setting that is null has the task's own value; one that the task does not have is refused.
    """

    task: Literal[
        "mqar",
        "needle_single_1",
        "needle_single_2",
        "needle_single_3",
        "needle_multikey",
        "needle_multivalue",
        "needle_multiquery",
        "facts",
        "noisy_recall",
        "fuzzy_recall",
        "selective_copy",
        "compress",
        "memorise",
        "parity",
        "aa",
        "abab",
        "anbn",
        "anbncn",
        "shuffle2",
        "modular_sum",
        "permutations",
        "classes",
        "continuation",
        "translation",
    ] = "parity"
    """What is asked; `docs/suites.md` describes each."""
    length: Annotated[int, NumberRange("[2, inf)")] | None = None
    """Tokens of an example, at most `train.seq_len`; the rest of a row is filled up and asks nothing. Null fills the
    row."""
    shortest: Count | None = None
    """Tokens of the shortest string of a language whose strings differ in length; the longest has `length`."""
    num_symbols: Annotated[int, NumberRange("[2, inf)")] | None = None
    """Symbols of the task: keys and values, the modulus, the permuted objects, names, words of a kind."""
    num_pairs: Count | None = None
    """What must be held at once: pairs of key and value, needles, facts, symbols to copy, classes."""
    distance: CountOrZero | None = None
    """Tokens, at least, between what is asked for and its question. Of needles and facts exactly so many, up to a
    sentence; null puts them anywhere."""
    value_length: Count | None = None
    """Tokens of a needle's value; most tokens of a key and of a value of `fuzzy_recall`."""
    noise: FractionOrZero | None = None
    """Share of the tokens that say nothing."""
    num_hops: Annotated[int, NumberRange("[1, 2]")] | None = None
    """Facts that an answer of `facts` needs: where a person is (1), or where what the person carries is (2)."""
    num_moved: Annotated[int, NumberRange("[2, inf)")] | None = None
    """Objects that a permutation moves at most; 2 leave swaps and the permutation that moves nothing."""
    num_sessions: Count | None = None
    """Sessions of `classes`, each of which introduces its share of the classes."""
    language: Literal["first", "second", "both"] | None = None
    """Which of two languages is read; both are one or the other by chance."""
    num_samples: Count = 100_000
    """Training sequences per epoch."""
