from __future__ import annotations

import pytest

from hopescale.evals.distribute import distribute, group_by_length
from hopescale.parallel.mesh import Mesh


@pytest.mark.parametrize("tokens", [1, 20, 50, 10_000])
@pytest.mark.parametrize("spread", [None, 0, 5])
def test_every_text_is_in_one_batch_that_is_not_too_large(tokens: int, spread: int | None):
    lengths = [(7 * number) % 23 + 1 for number in range(40)]
    batches = group_by_length(lengths, tokens=tokens, spread=spread)
    assert sorted(number for batch in batches for number in batch) == list(range(40))
    for batch in batches:
        sizes = [lengths[number] for number in batch]
        assert len(batch) == 1 or max(sizes) * len(batch) <= tokens
        assert spread is None or max(sizes) - min(sizes) <= spread
    assert tokens > 1 or len(batches) == 40
    assert tokens < 10_000 or spread is not None or len(batches) == 1


def test_nothing_to_do_is_no_batch():
    assert group_by_length([], tokens=10) == []
    assert distribute(Mesh.alone().control, [], lambda batch: batch) == []


def test_results_come_back_in_order():
    found = distribute(Mesh.alone().control, [[3, 0], [1], [4, 2]], lambda batch: [10 * number for number in batch])
    assert found == [0, 10, 20, 30, 40]
