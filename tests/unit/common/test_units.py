"""Numbers are written as people write them."""

from __future__ import annotations

import pytest

from hopescale.common.units import plural


@pytest.mark.parametrize(("count", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (2048, "2,048 files")])
def test_a_noun_has_the_number_of_its_count(count: int, text: str):
    assert plural(count, "file") == text
