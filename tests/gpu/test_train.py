"""A training run on a GPU against the same run on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


# Compiling alone takes minutes, most of all for MLPs with products that are as exact as those of a CPU.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("memory", "precision"), [pytest.param("linear", "tf32", marks=pytest.mark.smoke), ("mlp", "tf32x3")]
)
def test_a_run_has_the_losses_of_a_cpu(memory: str, precision: str, tmp_path: Path):
    """Streams rounded to TF32 change these losses by at most 2e-4."""
    runs = {"cuda": [f"train.kernel_precision={precision}"], "cpu": []}
    losses = [losses_on(device, memory, settings, tmp_path / device) for device, settings in runs.items()]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=0)


def losses_on(device: str, memory: str, settings: list[str], folder: Path) -> list[float]:
    settings = [f"model.mixers.hope.memory={memory}", "model.num_heads=4", *settings]
    settings += [f"train.device={device}", "train.precision=fp32", "train.steps=5", "log.every=1"]
    command = [sys.executable, "-m", "hopescale", "train", "debug", *settings, "--run-dir", str(folder)]
    subprocess.run(command, check=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]
