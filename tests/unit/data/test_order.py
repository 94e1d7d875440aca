from __future__ import annotations

import itertools

import numpy as np
import pytest

from hopescale.data.order import PATTERN_LENGTH, Mixture, Permutation, derive_key


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 16, 17, 63, 64, 65, 100, 1000, 4097])
def test_each_element_comes_exactly_once(size: int) -> None:
    for key in range(3):
        assert sorted(map(Permutation(size, key), range(size))) == list(range(size))


def test_huge_ranges_need_no_memory_and_stay_inside() -> None:
    permutation = Permutation(10**15, 7)
    images = [permutation(index) for index in range(1000)]
    assert len(set(images)) == 1000 and min(images) >= 0 and max(images) < 10**15
    assert 0.4e15 < np.mean(images) < 0.6e15


def test_the_order_looks_random() -> None:
    size = 5000
    order = np.array([Permutation(size, 3)(index) for index in range(size)])
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (order == np.arange(size)).sum() < 8
    assert (np.abs(np.diff(order)) == 1).sum() < 12


def test_keys_give_different_orders_and_small_ones_all_of_them() -> None:
    orders = {tuple(map(Permutation(4, key), range(4))) for key in map(derive_key, range(2000))}
    assert orders == set(itertools.permutations(range(4)))


def test_an_index_outside_is_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, 0)(index)


def test_seed_source_and_epoch_each_change_the_order() -> None:
    def order(seed: int = 0, source: str = "a", epoch: int = 0) -> list[int]:
        mixture = Mixture({source: 1}, seed=seed)
        return [mixture.locate(500 * epoch + index, {source: 500}).sample for index in range(500)]

    orders = [order(), order(seed=1), order(source="b"), order(epoch=1)]
    assert order() == orders[0]
    assert all(sum(map(int.__eq__, a, b)) < 10 for a, b in itertools.combinations(orders, 2))


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    alone = Mixture({"main": 1}, seed=0)
    assert [alone.locate(i, {"main": 100}).sample for i in range(5)] == [44, 87, 8, 92, 30]
    mixture = Mixture({"a": 3, "b": 1}, seed=0)
    assert "".join(mixture.locate(i, {"a": 9, "b": 9}).source for i in range(16)) == "aabaaababaaaaaab"


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ({"a": 1.0}, {"a": 4096}),
        ({"a": 3.0, "b": 1.0}, {"a": 3072, "b": 1024}),
        ({"a": 0.7, "b": 0.3}, {"a": 2867, "b": 1229}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1366, "b": 1365, "c": 1365}),
    ],
)
def test_shares_follow_the_weights_by_largest_remainder(weights: dict, quotas: dict) -> None:
    mixture = Mixture(weights, seed=5)
    assert mixture.quotas == quotas
    assert mixture.counts(10 * PATTERN_LENGTH) == {name: 10 * quota for name, quota in quotas.items()}


def test_every_stretch_is_near_the_weights() -> None:
    mixture = Mixture({"a": 5, "b": 2, "c": 1}, seed=1)
    for stop in range(1, 2 * PATTERN_LENGTH, 13):
        counts = mixture.counts(stop)
        assert sum(counts.values()) == stop
        for name, quota in mixture.quotas.items():
            assert abs(counts[name] - stop * quota / PATTERN_LENGTH) < 3


def test_each_source_reads_every_sample_once_per_epoch() -> None:
    sizes = {"a": 700, "b": 90}
    mixture = Mixture({"a": 0.8, "b": 0.2}, seed=3)
    positions = [mixture.locate(index, sizes) for index in range(3 * PATTERN_LENGTH)]
    assert mixture.counts(3 * PATTERN_LENGTH) == {name: sum(p.source == name for p in positions) for name in sizes}
    for name, size in sizes.items():
        mine = [p for p in positions if p.source == name]
        assert [p.epoch for p in mine] == [number // size for number in range(len(mine))]
        epochs = [[p.sample for p in mine if p.epoch == epoch] for epoch in range(len(mine) // size)]
        assert len(epochs) >= 3 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_places_of_two_sources_are_mixed_at_random() -> None:
    mixture = Mixture({"a": 1, "b": 1}, seed=0)
    sources = [mixture.locate(index, {"a": 9**9, "b": 9**9}).source for index in range(400)]
    pairs = [a + b for a, b in zip(sources[::2], sources[1::2], strict=True)]
    assert set(pairs) == {"ab", "ba"} and 60 < pairs.count("ab") < 140
