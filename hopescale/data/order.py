"""Which sample comes when: pure functions of seed, epoch and index, with no list of samples anywhere.

Ranks ask by global index, so the order is the same for every number of ranks and after every resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import isqrt
from typing import NamedTuple

import numpy as np

PATTERN_LENGTH = 4096

_MASK = (1 << 64) - 1
_NUM_ROUNDS = 8


def derive_key(*parts: object) -> int:
    """Hash seeds, names and counters to 64 bits; equal parts give equal keys on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(value: int) -> int:
    """Scramble 64 bits so that every input bit sways every output bit (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A keyed bijection of `range(size)` in constant memory; each key of 64 bits is another permutation.

    A Feistel network over pairs `(left, right)` of a grid just larger than `size`: each round shifts one half by a
    hash of the other, which can be undone and so loses nothing. A result outside the range is sent through again.
    """

    def __init__(self, size: int, key: int):
        """Prepare the network."""
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = [mix64(key ^ round) for round in range(_NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Map an index of `range(size)` to another."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside range({self.size})")
        index = self._pass(index)
        while index >= self.size:
            index = self._pass(index)
        return index

    def _pass(self, index: int) -> int:
        left, right = divmod(index, self._columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                right = (right + mix64(key ^ left)) % self._columns
            else:
                left = (left + mix64(key ^ right)) % self._rows
        return left * self._columns + right


class Position(NamedTuple):
    """Where a global sample index falls: a source, a pass over it, a sample of it."""

    source: str
    epoch: int
    sample: int


class Mixture:
    """The interleaving of weighted sources, as a repeated pattern of `PATTERN_LENGTH` places.

    Each source has a whole number of places, its share of the pattern rounded by largest remainder. Within the pattern
    its places are spread evenly with a random shift each, so every stretch of samples is near the weights too.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int):
        """Lay out the pattern for positive weights, which need not sum to 1."""
        self._seed = seed
        self._names = list(weights)
        self.quotas = quotas(weights)
        self._pattern = _spread(self.quotas, seed)
        one_hot = self._pattern[None, :] == np.arange(len(self._names))[:, None]
        self._before = np.concatenate([np.zeros((len(self._names), 1), np.int64), one_hot.cumsum(axis=1)], axis=1)

    def locate(self, index: int, num_samples: Mapping[str, int]) -> Position:
        """Find the sample of an index of the whole run, given the samples per epoch of each source.

        Each epoch of each source has an order of its own.
        """
        repeat, place = divmod(index, PATTERN_LENGTH)
        number = int(self._pattern[place])
        name = self._names[number]
        within = repeat * self.quotas[name] + int(self._before[number, place])
        epoch, step = divmod(within, num_samples[name])
        order = Permutation(num_samples[name], derive_key(self._seed, name, epoch))
        return Position(name, epoch, order(step))

    def counts(self, num_sequences: int) -> dict[str, int]:
        """Count how many of the first sequences come from each source."""
        repeats, rest = divmod(num_sequences, PATTERN_LENGTH)
        return {
            name: repeats * self.quotas[name] + int(self._before[number, rest])
            for number, name in enumerate(self._names)
        }


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Return the places of each source in the pattern; equal remainders are rounded up in the order of the sources."""
    total = sum(weights.values())
    shares = [weight / total * PATTERN_LENGTH for weight in weights.values()]
    places = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (places[i] - shares[i], i))
    for i in by_remainder[: PATTERN_LENGTH - sum(places)]:
        places[i] += 1
    return dict(zip(weights, places, strict=True))


def _spread(places_of: Mapping[str, int], seed: int) -> np.ndarray:
    """Order the places: place `j` of `q` falls at random within the `j`-th of `q` equal parts. Shape `[P]`, int64."""
    keys = {name: derive_key("mixture", seed, name) for name in places_of}
    places = [
        ((rank + mix64(keys[name] ^ rank) / 2**64) / quota, number)
        for number, (name, quota) in enumerate(places_of.items())
        for rank in range(quota)
    ]
    return np.array([number for _, number in sorted(places)], np.int64)
