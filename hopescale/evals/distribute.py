"""Work cut into batches that no number of ranks changes, and dealt out to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hopescale.parallel.control import Control

T = TypeVar("T")
Tell = Callable[[int, int], None]
"""A listener for how much of something is done, and how much there is."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def group_by_length(lengths: Sequence[int], *, tokens: int, spread: int | None = None) -> list[list[int]]:
    """Put the numbers of texts of similar length together.

    Args:
        lengths: Tokens of each text.
        tokens: Most tokens of a batch, all rows counted as long as the longest; a longer text is a batch of its own.
        spread: Most tokens by which the lengths of a batch may differ; None is any number.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and longest * (len(batches[-1]) + 1) <= tokens
        if fits and (spread is None or longest - lengths[number] <= spread):
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def distribute(
    control: Control,
    batches: Sequence[Sequence[int]],
    work: Callable[[list[int]], Sequence[T]],
    tell: Tell = silent,
) -> list[T]:
    """Do each batch on one of the ranks, and return the result of each number everywhere. Called by all ranks.

    Args:
        control: Control by which ranks meet.
        batches: Numbers from 0, each once; the same on every rank.
        work: Function that gives one result for each number of a batch; results must pickle.
        tell: Listener after each batch for how many numbers of this rank are done, and how many there are.
    """
    own: dict[int, T] = {}
    share = batches[control.rank :: control.num_ranks]
    for batch in share:
        own |= zip(batch, work(list(batch)), strict=True)
        tell(len(own), sum(map(len, share)))
    done = {number: result for of_rank in control.gather(own) for number, result in of_rank.items()}
    return [done[number] for number in range(len(done))]
