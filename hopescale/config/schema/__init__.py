"""The config tree as frozen dataclasses. Every field has its docstring beneath it: meaning, unit, effect."""

from hopescale.config.schema.data import DataConfig, SourceConfig, SyntheticConfig
from hopescale.config.schema.model import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    ModelConfig,
    SelfModifyingConfig,
)
from hopescale.config.schema.optim import GroupConfig, OptimConfig, ScheduleConfig
from hopescale.config.schema.parallel import ParallelConfig
from hopescale.config.schema.run import RunConfig
from hopescale.config.schema.train import CheckpointConfig, LogConfig, TrainConfig, ValidationConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "CmsConfig",
    "DataConfig",
    "GroupConfig",
    "LevelConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelfModifyingConfig",
    "SourceConfig",
    "SyntheticConfig",
    "TrainConfig",
    "ValidationConfig",
]
