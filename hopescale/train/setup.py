"""Building a run from its config: device, model, data, optimizer, and the checkpoint it continues from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from hopescale.checkpoint.manager import CheckpointManager, find_checkpoint, latest_checkpoint
from hopescale.checkpoint.manifest import read_manifest
from hopescale.common.errors import CheckpointError, ConfigError
from hopescale.config.load import from_dict
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.config.show import diff, format_diff, identity_problems
from hopescale.data.loader import Data, open_data
from hopescale.models import Model
from hopescale.observe.health import LossWatch
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.train.folder import RunFolder
from hopescale.train.memory import check_memory
from hopescale.train.state import TrainState

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}

Resume = Literal["auto", "never", "must"] | Path
Report = Callable[[str], None]


def build_state(config: RunConfig, device: torch.device) -> TrainState:
    """Build model, data and optimizer at step 0.

    Raises:
        ConfigError: If the model cannot fit the device's memory, or the data does not fit the config or does not last.
        DataError: If files are missing or damaged.
    """
    check_memory(config, device)
    torch.manual_seed(config.train.seed)
    data = open_data(config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size)
    data.check_budget(make_plan(config).total_sequences)
    model = Model(config.model, seed=config.train.seed).to(device).to_precision(PRECISIONS[config.train.precision])
    levels = dict(model.levels())
    cadences = {
        name: Cadence(levels[level].update_every_steps, levels[level].phase)
        for level, names in model.level_parameters().items()
        for name in names
    }
    optimizer = OuterOptimizer(dict(model.named_parameters()), config.optim, config.train.steps, cadences)
    return TrainState(config, model, optimizer, data, LossWatch(config.train.loss_spike))


def choose_checkpoint(folder: RunFolder, resume: Resume) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    Args:
        resume: `auto` continues if there is a checkpoint, `never` refuses to, `must` refuses to begin anew; a path
            continues from that checkpoint.

    Raises:
        CheckpointError: If the folder does not hold what `resume` asks for.
    """
    if isinstance(resume, Path):
        return find_checkpoint(resume)
    latest = latest_checkpoint(folder.checkpoints)
    if resume == "never" and latest is not None:
        hint = "choose another --run-dir, or leave --resume out to continue it"
        raise CheckpointError(f"--resume never, but {folder.path} already holds {latest.name}", hint)
    if resume == "must" and latest is None:
        raise CheckpointError(f"--resume must, but {folder.checkpoints} holds no checkpoint", "check --run-dir")
    return latest


def restore(state: TrainState, checkpoint: Path, report: Report) -> None:
    """Continue `state` from a checkpoint, after comparing what a run keeps for life.

    Raises:
        ConfigError: If the config changes the run's identity.
        CheckpointError: If the data under the same path is other data, or the checkpoint is damaged.
    """
    manifest = read_manifest(checkpoint)
    old = from_dict(manifest.config, str(checkpoint))
    if problems := identity_problems(old, state.config):
        raise ConfigError(problems)
    if manifest.identity["data"] != state.data.fingerprint:
        hint = "prepare new text into a new folder, and begin a new run with it"
        raise CheckpointError(f"the data is not what {checkpoint} was trained on, though its path is the same", hint)
    if changes := diff(old, state.config):
        report("changed since the checkpoint:\n" + format_diff(changes))
    state.restore(checkpoint)
    if state.step > state.config.train.steps:
        hint = "set train.steps higher"
        raise ConfigError(f"{checkpoint} is at step {state.step}, beyond train.steps={state.config.train.steps}", hint)
    report(f"resumed from {checkpoint} at step {state.step}")


def open_checkpoints(folder: RunFolder, config: RunConfig, data: Data) -> CheckpointManager:
    """Open the run's checkpoints for writing, each with a copy of the tokenizer.

    Raises:
        CheckpointError: If the folder cannot be prepared.
    """
    tokenizer = None
    if data.tokenizer is not None:
        tokenizer = data.tokenizer.copy_to(folder.path)
    return CheckpointManager(folder.checkpoints, config.checkpoint, tokenizer=tokenizer)
