from __future__ import annotations

import pytest

from hopescale.config.load import load_recipe
from hopescale.config.notes import notes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), []),
        (("train.steps=3",), ["level slow is due at no step up to train.steps=3; its weights stay"]),
        (
            ("train.steps=3", "model.cms.levels.slow.phase=2"),
            ["level slow is due once up to train.steps=3, at step 2"],
        ),
        (
            ("train.steps=3", "model.cms.levels.slow.rolling=true"),
            ["level slow is due at no step up to train.steps=3 in 1 of 2 blocks, where its weights stay"],
        ),
        (
            ("optim.schedule.warmup_steps=200",),
            [
                "optim.schedule.warmup_steps=200 is not below train.steps=100: the learning rate only rises, "
                "to 0.0015 of optim.lr=0.003"
            ],
        ),
    ],
)
def test_what_a_run_will_not_come_to_is_told(overrides, expected):
    mid = "model.cms.levels.mid.update_every_steps=1"
    assert notes(load_recipe("debug", [mid, *overrides]).config) == expected
