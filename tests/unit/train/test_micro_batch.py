"""A start settles `train.micro_batch_size: auto` by the device's memory, or as the run that it continues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.record import write_record
from hopescale.train import device_memory, micro_batch
from hopescale.train.micro_batch import settle_micro_batch, with_size
from hopescale.train.request import RunRequest

CPU = torch.device("cpu")


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    loaded = load_recipe("debug", ["train.micro_batch_size=auto"])
    return RunRequest(loaded, Layout(), tmp_path, ["train.micro_batch_size=auto"])


def test_a_new_run_takes_the_largest_and_writes_it_down(request_: RunRequest, tmp_path: Path):
    size, line = settle_micro_batch(request_, CPU)
    assert size == 8  # the whole step
    assert line is not None and line.startswith("train.micro_batch_size: 8, the most of which a step fits cpu: ")
    request = with_size(request_, size)
    write_record(tmp_path, request.loaded, request.layout, request.overrides)
    assert "micro_batch_size: 8\n" in (tmp_path / "config.yaml").read_text()
    assert settle_micro_batch(request, CPU) == (8, None)


def test_a_run_that_has_begun_keeps_its_own(request_: RunRequest, tmp_path: Path):
    begun = with_size(request_, 2)
    write_record(tmp_path, begun.loaded, begun.layout, ())
    assert settle_micro_batch(request_, CPU) == (2, "train.micro_batch_size: 2, as before")
    # Sixteen replicas would leave half a sequence to each; eight leave one, which two do not divide.
    assert settle_micro_batch(replace(request_, layout=Layout(dp=8)), CPU)[0] == 1


def test_a_device_without_room_is_refused(request_: RunRequest, monkeypatch: pytest.MonkeyPatch):
    for module in (device_memory, micro_batch):
        monkeypatch.setattr(module, "memory_of", lambda device: 3 << 20)
    with pytest.raises(ConfigError, match="a step takes|whose weights"):
        settle_micro_batch(request_, CPU)
