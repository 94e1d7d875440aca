"""Sums begin in one order, whatever the order of gradients."""

from __future__ import annotations

import pytest

from hopescale.optim.early import EarlySums


@pytest.mark.parametrize(
    ("arrivals", "after_each"),
    [("eabcd", [0, 0, 1, 1, 3]), ("cdab", [0, 0, 0, 2]), ("abx", [0, 1, 1]), ("a", [0]), ("", [])],
)
def test_a_sum_begins_when_it_is_complete_and_those_before_it_have_begun(arrivals: str, after_each: list[int]):
    begun: list[str] = []
    sums = EarlySums()
    sums.arrive("a")  # of a backward pass before the last: nothing is expected yet
    sums.expect(["ab", "cd", "e"], lambda names: begun.append("".join(names)))
    for name, count in zip(arrivals, after_each, strict=True):
        sums.arrive(name)
        assert len(begun) == count
    sums.begin_rest()
    assert begun == ["ab", "cd", "e"]


def test_a_second_gradient_is_no_surprise_to_be_lost():
    sums = EarlySums()
    sums.expect(["ab"], lambda names: None)
    sums.arrive("a")
    with pytest.raises(AssertionError, match="second gradient"):
        sums.arrive("a")
