"""The whole of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from hopescale.config.schema.data import DataConfig
from hopescale.config.schema.model import ModelConfig
from hopescale.config.schema.optim import OptimConfig
from hopescale.config.schema.parallel import ParallelConfig
from hopescale.config.schema.train import CheckpointConfig, LogConfig, TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """A recipe after its bases and overrides have been applied."""

    name: str = "run"
    """Name of the run; its folder is `runs/<name>` unless `--run-dir` says otherwise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How it is split over ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""
    log: LogConfig = field(default_factory=LogConfig)
    """The records."""
