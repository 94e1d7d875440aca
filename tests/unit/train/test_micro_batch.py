"""A start settles `train.micro_batch_size: auto` by the device's memory, or as the run that it continues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopescale.checkpoint.manifest import MANIFEST, Manifest, to_json
from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe, to_dict
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import planned_bytes, with_micro_batch
from hopescale.train.device_memory import RankMemory, run_here
from hopescale.train.micro_batch import settle_alone, settle_micro_batch
from hopescale.train.request import RunRequest

CPU = torch.device("cpu")
LARGE = RankMemory(CPU, 2**40)


@pytest.fixture
def request_(tmp_path: Path) -> RunRequest:
    loaded = load_recipe("debug", ["train.micro_batch_size=auto"])
    return RunRequest(loaded, Layout(), tmp_path, ["train.micro_batch_size=auto"])


def checkpoint(root: Path, config: RunConfig, size: int) -> Path:
    """Write a checkpoint of a run with micro batches of a size, without its tensors."""
    folder = root / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(to_json(Manifest({"step": 1}, to_dict(with_micro_batch(config, size)), {})))
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    return folder


def need(config: RunConfig, size: int) -> float:
    return planned_bytes(run_here(with_micro_batch(config, size), CPU), Layout(), "cpu")


def test_a_new_run_takes_the_largest(request_: RunRequest, tmp_path: Path):
    request, line = settle_micro_batch(request_, None, LARGE)
    assert request.loaded.config.train.micro_batch_size == 8  # the whole step
    assert line is not None and line.startswith("train.micro_batch_size: 8, the most of which a step fits cpu: ")
    assert settle_micro_batch(request, None, LARGE) == (request, None)


def test_a_run_that_has_a_checkpoint_keeps_its_own_where_that_divides_and_fits(request_: RunRequest, tmp_path: Path):
    config = request_.loaded.config
    (tmp_path / "config.yaml").write_text("train: {micro_batch_size: 1}\n")
    assert settle_alone(request_, LARGE)[0].loaded.config.train.micro_batch_size == 8, "no run, but a config"
    folder = checkpoint(tmp_path, config, 4)
    request, line = settle_alone(request_, LARGE)
    assert (request.loaded.config.train.micro_batch_size, line) == (4, "train.micro_batch_size: 4, as before")
    assert settle_micro_batch(request_, folder, RankMemory(CPU, need(config, 4)))[0] == request
    small = RankMemory(CPU, (need(config, 4) + need(config, 2)) / 2)
    request, line = settle_micro_batch(request_, folder, small)
    assert request.loaded.config.train.micro_batch_size in (1, 2) and line.endswith(" by its plan; it was 4")
    # Eight replicas have one sequence each, which four do not divide.
    request, line = settle_micro_batch(replace(request_, layout=Layout(dp=8)), folder, LARGE)
    assert request.loaded.config.train.micro_batch_size == 1 and line.endswith("; it was 4")


def test_stages_that_interleave_keep_no_number_that_leaves_a_group_incomplete(tmp_path: Path):
    overrides = ["train.micro_batch_size=auto", "model.num_layers=4", "parallel.pp=2", "parallel.virtual_stages=2"]
    request = RunRequest(load_recipe("debug", overrides), Layout(pp=2, virtual_stages=2), tmp_path / "run")
    folder = checkpoint(tmp_path, request.loaded.config, 8)
    settled, line = settle_micro_batch(request, folder, LARGE)
    assert settled.loaded.config.train.micro_batch_size == 4 and line.endswith("; it was 8")


def test_a_device_without_room_is_refused(request_: RunRequest):
    with pytest.raises(ConfigError, match="a step takes|whose weights"):
        settle_micro_batch(request_, None, RankMemory(CPU, 3 << 20))
