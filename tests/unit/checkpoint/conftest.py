"""A small state with every kind of tensor a run holds, and a manager over a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import Manifest
from hopescale.config.schema import CheckpointConfig


def _state(fill: float = 1.0) -> dict[str, dict[str, Tensor]]:
    base = torch.arange(100.0) * fill
    return {
        "model": {
            "weight": (torch.arange(12.0).view(3, 4) * fill + 0.1).bfloat16(),
            "parameter": torch.nn.Parameter(torch.full((2, 2), fill / 3)),
            "view": base[10:20],
            "transposed": base[:24].view(4, 6).t(),
            "scalar": torch.tensor(fill),
            "empty": torch.zeros(0, 3),
            "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        },
        "optimizer": {"step": torch.tensor(int(fill)), "half": torch.full((3,), fill).half()},
        "generators": {"cpu": torch.get_rng_state()},
    }


def _manifest(step: int, **progress: object) -> Manifest:
    return Manifest({"step": step, "tokens_seen": 8 * step, **progress}, {"name": "tiny"}, {"model": "abc"})


@pytest.fixture
def make_state() -> Callable[..., dict[str, dict[str, Tensor]]]:
    return _state


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return _manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def make_manager(root: Path) -> Callable[..., CheckpointManager]:
    def make(tokenizer: Sequence[Path] = (), **settings: object) -> CheckpointManager:
        return CheckpointManager(root, CheckpointConfig(**{"async_save": False, **settings}), tokenizer=tokenizer)

    return make
