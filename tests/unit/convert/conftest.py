"""Checkpoints of tiny models, written without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.manifest import Manifest
from hopescale.config.load import load_recipe, to_dict
from hopescale.models import Model

TINY = (
    "model.d_model=32",
    "model.num_layers=2",
    "model.vocab_size=40",
    "model.mixers.hope.chunk_size=8",
    "model.cms.levels.fast.d_ff=16",
    "model.cms.levels.mid.d_ff=16",
    "model.cms.levels.slow.d_ff=16",
    "train.seq_len=48",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=96",
    "train.validation.tokens=96",
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of `debug` with overrides; returns its folder."""

    def write(*overrides: str) -> Path:
        config = load_recipe("debug", [*TINY, *overrides]).config
        weights = {name: p.detach() for name, p in Model(config.model, seed=3).named_parameters()}
        root = tmp_path / f"run{len(list(tmp_path.glob('run*')))}" / "checkpoints"
        progress = {"step": 7, "tokens_seen": 672, "watch": []}
        manifest = Manifest(progress=progress, config=to_dict(config), identity={"model": "m", "data": "d"})
        CheckpointManager(root, config.checkpoint).save(7, {"model": weights}, manifest, blocking=True)
        return root / "step-00000007"

    return write
