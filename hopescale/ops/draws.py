"""Random numbers that are functions of a key and a position: any part of a tensor can be drawn without the rest.

They come from a counter-based generator, Philox4x64-10 (Salmon et al., SC 2011). Sums, products and a table make
normal numbers of them. IEEE 754 leaves no choice in sums and products, so that neither the part that is drawn nor the
number of threads changes a bit. Nor does the processor, as long as its logarithms, of which the table is made, round
to the same float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

NUMBERS_PER_COUNT = 8
"""Numbers of 32 bits that the generator makes of one value of its counter."""

SEGMENT_BITS = 7
"""Binary digits of the number of a segment within its octave, see `normal`."""

EXPONENT_OF_LEAST = 127 - 33
"""Exponent, with float32's bias, of the smallest probability that `normal` meets, 2^-33."""


class RandomBits:
    """An endless row of random 32-bit numbers.

    Args:
        key: Text that tells rows apart.
    """

    def __init__(self, key: str):
        digest = hashlib.sha256(key.encode()).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._count = 0

    def at(self, runs: Iterable[range]) -> Tensor:
        """Return the numbers at positions, run after run, as int32."""
        return torch.from_numpy(np.concatenate([self._run(run.start, run.stop) for run in runs]))

    def _run(self, start: int, stop: int) -> np.ndarray:
        first, end = start // NUMBERS_PER_COUNT, -(-stop // NUMBERS_PER_COUNT)
        if first != self._count:
            self._philox.advance(first - self._count)
        self._count = end
        numbers = self._philox.random_raw((end - first) * NUMBERS_PER_COUNT // 2).view(np.int32)
        return numbers[start - first * NUMBERS_PER_COUNT : stop - first * NUMBERS_PER_COUNT]


def uniform(bits: Tensor) -> Tensor:
    """Turn random numbers into others that are even in (0, 1), without its ends, float64."""
    return bits.double().add_(2.0**31 + 0.5).mul_(2.0**-32)


def normal(bits: Tensor) -> Tensor:
    """Turn random numbers into normal ones of mean 0 and standard deviation 1, float32, none beyond 6.34.

    The sign of a random number is kept. Its other bits `k` are the probability of a larger one, `v = (k + 1/2) / 2^32`
    in (0, 1/2]. The inverse of the normal distribution is interpolated between 128 places in each octave of `v`, which
    is exact to 4e-6. The exponent of `v` and its first binary digits, as float32 has them, are the number of a segment.
    The other digits are the place in it.
    """
    digits = 23 - SEGMENT_BITS
    tail = bits.bitwise_xor(bits.bitwise_right_shift(31)).float().add_(0.5).mul_(2.0**-32).view(torch.int32)
    place = tail.bitwise_and((1 << digits) - 1).float().mul_(2.0**-digits)
    segment = tail.bitwise_right_shift_(digits).sub_(EXPONENT_OF_LEAST << SEGMENT_BITS)
    start, rise = _segments()
    size = rise.index_select(0, segment).mul_(place).add_(start.index_select(0, segment))
    return size.copysign_(bits.float())


@cache
def _segments() -> tuple[Tensor, Tensor]:
    """Return the inverse of the normal distribution at the start of each segment, and how far it goes in it."""
    shift, first = 23 - SEGMENT_BITS, EXPONENT_OF_LEAST << SEGMENT_BITS
    last = 126 << SEGMENT_BITS  # the segment that starts at 1/2, of which only the start is met
    starts = (np.arange(first, last + 2, dtype=np.int32) << shift).view(np.float32)
    inverse = np.array([-NormalDist().inv_cdf(each) for each in starts.tolist()], np.float32)
    return torch.from_numpy(inverse[:-1]), torch.from_numpy(np.diff(inverse))
