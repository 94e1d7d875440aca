"""One process of a training run, from a checked config to its last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hopescale.common.errors import ConfigError, StoppedEarly
from hopescale.config.load import Loaded
from hopescale.config.schema import RunConfig
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.observe.throughput import Throughput
from hopescale.optim.groups import group_table
from hopescale.parallel.device import choose_device
from hopescale.train.folder import RunFolder
from hopescale.train.memory import memory_errors_explained
from hopescale.train.record import Record
from hopescale.train.setup import Report, Resume, build_state, choose_checkpoint, open_checkpoints, restore
from hopescale.train.stop import StopRequest
from hopescale.train.trainer import Trainer


def train(
    loaded: Loaded,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    stop: StopRequest,
    resume: Resume = "auto",
    stop_at: int | None = None,
    report: Report,
) -> None:
    """Train a run, or continue it, until its last step.

    Args:
        loaded: A recipe that has passed its checks.
        overrides: As given on the command line, for the record.
        run_dir: The run folder.
        stop: Read between steps; its handlers are installed by the caller, before the slow imports.
        resume: See `choose_checkpoint`.
        stop_at: Step to save and stop at, without changing the learning rate's horizon; None is `train.steps`.
        report: Takes each line meant for a person.

    Raises:
        StoppedEarly: If a signal ended the run before its time; it has been saved.
        HopescaleError: Whatever else a user can cause.
    """
    config = loaded.config
    last_step = config.train.steps if stop_at is None else stop_at
    if not 0 < last_step <= config.train.steps:
        raise ConfigError(f"--stop-at is {stop_at}, but the run has steps 1 to {config.train.steps} (train.steps)")
    device = choose_device(config.train.device, "train.device")
    with memory_errors_explained(config):
        state = build_state(config, device)
    with RunFolder(run_dir) as folder, memory_errors_explained(config):
        checkpoint = choose_checkpoint(folder, resume)
        if checkpoint is not None:
            restore(state, checkpoint, report)
        if state.step > last_step:
            raise ConfigError(f"--stop-at is {stop_at}, but {checkpoint} is already at step {state.step}")
        sizes = {name: parameter.numel() for name, parameter in state.model.named_parameters()}
        folder.describe(loaded, overrides, group_table(state.optimizer.groups, sizes))
        checkpoints = open_checkpoints(folder, config, state.data)
        report(f"{config.name}: {sum(sizes.values()):,} parameters on {device}, run folder {run_dir}")
        for level in sorted(state.levels_never_due()):
            report(f"note: level {level} is due at no step up to train.steps={config.train.steps}; its weights stay")
        with Record(folder, config.log, resume_step=None if checkpoint is None else state.step) as record:
            trainer = Trainer(state, checkpoints, record, _throughput(config, device), device, report)
            reason = trainer.run(last_step, stop)
    where = f"step {state.step} of {config.train.steps}"
    if reason is not None:
        saved = "the state is saved" if state.step else "there was nothing to save yet"
        again = "" if resume in ("auto", "must") else " with --resume auto"
        raise StoppedEarly(f"{reason} at {where}; {saved}", f"the same command{again} continues the run")
    report(f"done: {where}" if state.step == config.train.steps else f"stopped at {where}, as --stop-at asked")


def _throughput(config: RunConfig, device: torch.device) -> Throughput:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    flops = flops_per_token(config.model, config.train.seq_len)
    return Throughput(flops_per_token=flops, peak_flops=peak_bf16_flops(name))
