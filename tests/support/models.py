"""A small model to begin from."""

from __future__ import annotations

from hopescale.config.schema import CmsConfig, LevelConfig, ModelConfig, SelfModifyingConfig

LEVELS = {"fast": LevelConfig(d_ff=24), "slow": LevelConfig(d_ff=16, update_every_steps=4)}
BASE = ModelConfig(
    vocab_size=200,
    d_model=32,
    num_layers=2,
    num_heads=4,
    mixers={"hope": SelfModifyingConfig(chunk_size=8)},
    cms=CmsConfig(levels=LEVELS),
)
