"""The config tree as frozen dataclasses. Every field has its docstring beneath it: meaning, unit, effect."""

from hopescale.config.schema.mixers import KINDS as KINDS
from hopescale.config.schema.mixers import AttentionConfig as AttentionConfig
from hopescale.config.schema.mixers import MixerConfig as MixerConfig
from hopescale.config.schema.mixers import RopeScalingConfig as RopeScalingConfig
from hopescale.config.schema.mixers import SelfModifyingConfig as SelfModifyingConfig
from hopescale.config.schema.model import CmsConfig as CmsConfig
from hopescale.config.schema.model import LevelConfig as LevelConfig
from hopescale.config.schema.model import ModelConfig as ModelConfig
from hopescale.config.schema.model import TransferConfig as TransferConfig
from hopescale.config.schema.optim import DeepMomentumConfig as DeepMomentumConfig
from hopescale.config.schema.optim import DeltaMomentumConfig as DeltaMomentumConfig
from hopescale.config.schema.optim import GroupConfig as GroupConfig
from hopescale.config.schema.optim import M3Config as M3Config
from hopescale.config.schema.optim import MuonConfig as MuonConfig
from hopescale.config.schema.optim import OptimConfig as OptimConfig
from hopescale.config.schema.optim import ScheduleConfig as ScheduleConfig
from hopescale.config.schema.run import CheckpointConfig as CheckpointConfig
from hopescale.config.schema.run import DataConfig as DataConfig
from hopescale.config.schema.run import LogConfig as LogConfig
from hopescale.config.schema.run import ParallelConfig as ParallelConfig
from hopescale.config.schema.run import RunConfig as RunConfig
from hopescale.config.schema.run import SourceConfig as SourceConfig
from hopescale.config.schema.run import SyntheticConfig as SyntheticConfig
from hopescale.config.schema.run import TrainConfig as TrainConfig
from hopescale.config.schema.run import ValidationConfig as ValidationConfig
