"""Random numbers by key and position: the same however they are cut, and normal to the far ends of their tails."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from hopescale.ops.draws import RandomBits, normal, uniform

ENTRIES = 1 << 20


def drawn(key: str, entries: int = ENTRIES) -> torch.Tensor:
    return normal(RandomBits(key).at([range(entries)])).double()


def test_a_part_is_that_of_the_whole():
    whole = RandomBits("0:a").at([range(1000)])
    for start, stop in ((0, 1), (3, 9), (7, 8), (8, 16), (5, 5), (1, 1000)):
        assert RandomBits("0:a").at([range(start, stop)]).equal(whole[start:stop])
    bits = RandomBits("0:a")
    for _ in range(2):  # whatever was drawn before
        runs = bits.at([range(700, 720), range(3, 11), range(11, 20), range(700, 701)])
        assert runs.equal(torch.cat([whole[700:720], whole[3:20], whole[700:701]]))


def test_positions_may_be_beyond_32_bits():
    far = 1 << 40
    assert RandomBits("a").at([range(far, far + 20)])[5:].equal(RandomBits("a").at([range(far + 5, far + 20)]))


def test_numbers_stay_as_they_are():
    """The initial weights of every run with this seed; other versions of numpy and other processors draw them too."""
    bits = RandomBits("0:embedding.weight").at([range(6, 10)])
    assert bits.tolist() == [706398636, -1319652819, 1849434613, -1054492407]
    assert normal(bits).tolist() == [0.9762479662895203, -0.5036461353302002, 0.1748344898223877, -0.6886623501777649]
    assert uniform(bits).tolist() == [(number + 2**31 + 0.5) / 2**32 for number in bits.tolist()]


def test_neither_threads_nor_the_number_of_entries_change_a_bit():
    bits, threads = RandomBits("a").at([range(200_003)]), torch.get_num_threads()
    whole = normal(bits)
    try:
        torch.set_num_threads(3)
        assert normal(bits).equal(whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.cat([normal(part) for part in bits.split(37)]).equal(whole)


def test_every_normal_number_is_that_of_its_probability():
    """All octaves of both tails, and the ends."""
    tail = torch.cat([(1 << torch.arange(31)) + offset for offset in (-1, 0, 1)]).clamp(0, 2**31 - 1)
    tail = torch.cat([tail, torch.randint(2**31, (5000,), generator=torch.Generator().manual_seed(0))])
    tail = tail.to(torch.int32)
    exact = [-NormalDist().inv_cdf((number + 0.5) / 2**32) for number in tail.tolist()]
    for found in (normal(tail), -normal(~tail)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.tensor(exact).double(), rtol=0, atol=4e-6)
    assert normal(torch.tensor([0, -1], dtype=torch.int32)).tolist() == pytest.approx([6.338, -6.338], abs=1e-3)


def test_even_numbers_leave_out_the_ends():
    ends = uniform(torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32))
    assert ends.tolist() == [2.0**-33, 1 - 2.0**-33]


def test_moments_and_tails_are_those_of_the_normal_distribution():
    """Each to five of its standard errors."""
    z = drawn("0:some.weight")
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert z.pow(power).mean().item() == pytest.approx(moment, abs=5 * math.sqrt(variance / ENTRIES)), power
    for limit in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0):
        for side in (z, -z):
            p = NormalDist().cdf(-limit)
            assert (side > limit).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p / ENTRIES)), limit


def test_rows_names_seeds_and_neighbours_have_nothing_in_common():
    z = drawn("0:blocks.0.up.weight")
    others = {
        "next": z.roll(1),
        "next count": z.roll(8),
        "next row": z.roll(1024),
        "name": drawn("0:blocks.1.up.weight"),
        "seed": drawn("1:blocks.0.up.weight"),
    }
    for name, other in others.items():
        for a, b in ((z, other), (z.square() - 1, (other.square() - 1) / 2), (z.abs() - z.abs().mean(), other)):
            assert (a * b).mean().abs().item() < 6 / math.sqrt(ENTRIES), name
