"""A run whose schedule is changed is told what that does to its learning rate."""

from __future__ import annotations

from hopescale.config.load import load_recipe
from hopescale.train.setup import rate_jump


def jump(step: int, *overrides: str) -> str | None:
    return rate_jump(load_recipe("debug").config, load_recipe("debug", overrides).config, step)


def test_a_finished_run_that_is_lengthened_is_told_its_new_rate():
    assert jump(100, "train.steps=200") == (
        "the learning rate of step 101 is 0.00165 instead of 0.0003, 5.5 times as much: the schedule is now that of "
        "train.steps=200 and optim.lr=0.003, and was that of 100 and 0.003"
    )


def test_other_changes_are_told_where_they_move_the_rate():
    assert jump(10, "train.validation.every=10") is None
    assert "2 times as much" in jump(10, "optim.lr=6e-3")
    assert jump(2, "train.steps=101") is None
    assert jump(100, "optim.lr=6e-3") is None
