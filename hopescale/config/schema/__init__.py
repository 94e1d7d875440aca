"""The config tree as frozen dataclasses. Every field has its docstring beneath it: meaning, unit, effect."""

from hopescale.config.schema.data import DataConfig, SourceConfig, SyntheticConfig
from hopescale.config.schema.model import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    ModelConfig,
    RopeScalingConfig,
    SelfModifyingConfig,
    TransferConfig,
)
from hopescale.config.schema.optim import (
    DeepMomentumConfig,
    DeltaMomentumConfig,
    GroupConfig,
    M3Config,
    MuonConfig,
    OptimConfig,
    ScheduleConfig,
)
from hopescale.config.schema.parallel import ParallelConfig
from hopescale.config.schema.run import RunConfig
from hopescale.config.schema.train import CheckpointConfig, LogConfig, TrainConfig, ValidationConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "CmsConfig",
    "DataConfig",
    "DeepMomentumConfig",
    "DeltaMomentumConfig",
    "GroupConfig",
    "LevelConfig",
    "LogConfig",
    "M3Config",
    "ModelConfig",
    "MuonConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SelfModifyingConfig",
    "SourceConfig",
    "SyntheticConfig",
    "TrainConfig",
    "TransferConfig",
    "ValidationConfig",
]
