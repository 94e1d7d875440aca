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


@pytest.mark.smoke
@pytest.mark.parametrize("memory", ["mlp", "linear"])
def test_a_run_has_the_losses_of_a_cpu(memory: str, tmp_path: Path):
    losses = [losses_on(device, memory, tmp_path / device) for device in ("cuda", "cpu")]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=0)


def losses_on(device: str, memory: str, folder: Path) -> list[float]:
    settings = [f"model.mixers.hope.memory={memory}", "train.precision=fp32", "train.steps=5", "log.every=1"]
    command = [sys.executable, "-m", "hopescale", "train", "debug", f"train.device={device}", *settings]
    subprocess.run([*command, "--run-dir", str(folder)], check=True, timeout=300)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]
