from __future__ import annotations

from hopescale.common.groups import grouped


def test_groups_hold_as_much_as_fits_in_order():
    sizes = {"a": 3, "b": 4, "c": 2, "d": 30, "e": 1}
    assert list(grouped(sizes, sizes.get, 7)) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert list(grouped([], len, 7)) == []
