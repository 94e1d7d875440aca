from __future__ import annotations

import pytest

from hopescale.observe.console import format_step, format_validation


def test_the_whole_line():
    line = format_step(
        120,
        30000,
        {
            "loss": 3.82141,
            "grad_norm": 0.912,
            "lr": 3e-4,
            "device_memory/peak_gib": 41.2,
            "tps": 12480.4,
            "mfu": 0.4151,
            "eta_s": 3 * 3600 + 12 * 60 + 5,
        },
        due=("fast", "mid"),
    )
    assert line == (
        "step 120/30000  loss 3.8214  grad 0.91  lr 3.0e-4  mem 41.2GiB  tps 12,480  mfu 41.5%  eta 3h12m  due fast,mid"
    )


def test_what_is_unknown_is_left_out():
    assert format_step(1, 10, {"loss": 4.0}) == "step 1/10  loss 4.0000"
    assert format_step(1, 10, {"loss": 4.0, "tps": 99.6, "eta_s": 0}) == "step 1/10  loss 4.0000  tps 100  eta 0s"
    assert (
        format_step(1, 10, {"loss": 4.0, "lr": 0.0, "grad_norm": 0.0}) == "step 1/10  loss 4.0000  grad 0.00  lr 0.0e0"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0001234, "1.2e-4"), (0.005, "0.01"), (12.345, "12.35"), (1e7, "1.0e7"), (float("inf"), "inf")],
)
def test_gradient_norms_of_any_size_stay_readable(value: float, text: str):
    assert f"grad {text}" in format_step(1, 2, {"loss": 1.0, "grad_norm": value}).split("  ")


def test_small_memory_is_not_rounded_away():
    assert "mem 412.0MiB" in format_step(1, 2, {"loss": 1.0, "device_memory/peak_gib": 412 / 1024})


def test_validation():
    assert format_validation(100, 300, "text", loss=3.21012) == "step 100/300  val/text  loss 3.2101"
    assert format_validation(100, 300, "text", loss=3.2, bits_per_byte=1.443) == (
        "step 100/300  val/text  loss 3.2000  1.4430 bits/byte"
    )
