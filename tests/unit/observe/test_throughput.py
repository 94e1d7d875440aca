from __future__ import annotations

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from hopescale.observe.metrics import template_of
from hopescale.observe.throughput import Throughput, peak_memory_gib


def test_means_over_the_interval():
    meter = Throughput(num_devices=2, flops_per_token=6e9, peak_flops=1e12)
    meter.add(1000, 2.0, 0.5)
    meter.add(3000, 3.0, 0.1)
    values = meter.snapshot()
    assert values == pytest.approx({"tps": 400.0, "time/step_s": 2.5, "time/data_s": 0.3, "mfu": 2.4})
    assert all(template_of(name) for name in values)


def test_a_snapshot_starts_a_new_interval():
    meter = Throughput()
    assert meter.snapshot() == {}
    meter.add(1000, 2.0, 0.5)
    meter.snapshot()
    assert meter.snapshot() == {}
    meter.add(10, 1.0, 0.0)
    assert meter.snapshot() == {"tps": 10.0, "time/step_s": 1.0, "time/data_s": 0.0}


@pytest.mark.parametrize("known", [{"flops_per_token": 1.0}, {"peak_flops": 1.0}])
def test_no_mfu_without_both_numbers(known: dict[str, float]):
    meter = Throughput(**known)
    meter.add(1, 1.0, 0.0)
    assert "mfu" not in meter.snapshot()


@pytest.mark.parametrize(("platform", "peak"), [("linux", 3 * 2**20), ("darwin", 3 * 2**30)])
def test_peak_memory_on_cpu_is_that_of_the_process(monkeypatch, platform: str, peak: int):
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 10_000
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peak))
    assert peak_memory_gib(torch.device("cpu")) == 3.0
