"""One process of a training run, from a checked config to its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from hopescale.checkpoint.manager import find_checkpoint
from hopescale.common.errors import CheckpointError, StoppedEarly
from hopescale.common.rank_info import RankInfo
from hopescale.config.groups import group_summary, group_table
from hopescale.config.layout import Layout
from hopescale.config.load import LoadedConfig
from hopescale.config.schema import RunConfig
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.observe.throughput import Throughput
from hopescale.parallel import process
from hopescale.parallel.control import Control
from hopescale.parallel.init_distributed import init_distributed
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.traffic import Traffic
from hopescale.train.device_memory import memory_errors_explained
from hopescale.train.folder import RunFolder
from hopescale.train.record import Record
from hopescale.train.setup import Report, Resume, begin_from, build_state, choose_checkpoint, open_checkpoints, restore
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest
from hopescale.train.trainer import Trainer

T = TypeVar("T")


def train(
    loaded: LoadedConfig,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    rank_info: RankInfo | None = None,
    layout: Layout,
    stop: StopRequest,
    resume: Resume = "auto",
    reset_optimizer: bool = False,
    init: Path | None = None,
    stop_at: int | None = None,
    report: Report,
) -> None:
    """Meet the other ranks, then train a run, or continue it, until its last step. Called by every rank.

    Args:
        loaded: A recipe that has passed its checks.
        overrides: As given on the command line, for the record.
        run_dir: The run folder.
        rank_info: Which rank this process is; None is the only one.
        layout: How the ranks are distributed.
        stop: Read between steps; its handlers are installed by the caller, before the slow imports.
        resume: See `choose_checkpoint`.
        reset_optimizer: Whether to continue with the weights of a checkpoint and a new optimizer.
        init: Run folder or checkpoint whose weights a new run begins with; a run that has begun continues.
        stop_at: Step to save and stop at, at most `train.steps`, without changing the learning rate's horizon; None is
            `train.steps`.
        report: Takes each line meant for a person; every rank has the same ones.

    Raises:
        StoppedEarly: If a signal ended the run before its time; it has been saved.
        HopescaleError: Whatever else a user can cause.
    """
    config = loaded.config
    last_step = config.train.steps if stop_at is None else stop_at
    timeout = timedelta(seconds=config.parallel.first_step_timeout_s)
    mesh, device = init_distributed(rank_info, layout, config.train.device, "train.device", timeout=timeout)
    step, reason = train_on(
        mesh,
        device,
        loaded,
        overrides,
        run_dir,
        layout=layout,
        stop=stop,
        resume=resume,
        reset_optimizer=reset_optimizer,
        init=init,
        last_step=last_step,
        report=report,
    )
    if rank_info is not None:
        process.stop()
    where = f"step {step} of {config.train.steps}"
    if reason is not None:
        saved = "the state is saved" if step else "there was nothing to save yet"
        again = "" if resume in ("auto", "must") else " with --resume auto"
        raise StoppedEarly(f"{reason} at {where}; {saved}", f"the same command{again} continues the run")
    report(f"done: {where}" if step == config.train.steps else f"stopped at {where}, as --stop-at asked")


def train_on(
    mesh: Mesh,
    device: torch.device,
    loaded: LoadedConfig,
    overrides: Sequence[str],
    run_dir: Path,
    *,
    layout: Layout,
    stop: StopRequest,
    resume: Resume,
    reset_optimizer: bool = False,
    init: Path | None = None,
    last_step: int,
    report: Report,
) -> tuple[int, str | None]:
    """Train on ranks that have met; arguments as of `train`.

    Returns:
        The last step done, and the name of the signal that ended the run before its time or None.
    """
    config, control = loaded.config, Control(mesh)
    with memory_errors_explained(config):
        state = build_state(config, layout, mesh, device)
    folder = RunFolder(run_dir)
    with ExitStack() as stack, memory_errors_explained(config), _told_once(control):
        _open_on_first(control, stack, lambda: folder)
        checkpoint = control.broadcast_from_rank0(
            lambda: choose_checkpoint(folder, resume, reset_optimizer=reset_optimizer)
        )
        if checkpoint is not None:
            restore(state, checkpoint, last_step, control, report, reset_optimizer=reset_optimizer)
        elif init is not None:
            begin_from(state, control.broadcast_from_rank0(lambda: find_checkpoint(init)), control, report)
        table = group_table(state.optimizer.groups, state.sizes, state.optimizer.peak_rates())
        control.broadcast_from_rank0(lambda: folder.describe(loaded, layout, overrides, table))
        checkpoints = open_checkpoints(folder, config, state.data, mesh)
        for line in _introduction(state, layout, device, run_dir):
            report(line)
        resume_step = None if checkpoint is None else state.step
        record = _open_on_first(control, stack, lambda: Record(folder, config.log, resume_step=resume_step))
        trainer = Trainer(
            state,
            checkpoints,
            record,
            _throughput(config, layout, device),
            stack.enter_context(Traffic(mesh)),
            control,
            device,
            report,
        )
        reason = trainer.run(last_step, stop)
        outcome = f"{_outcome(state.step, config, reason)} at step {state.step} of {config.train.steps}"
        control.broadcast_from_rank0(lambda: folder.note_outcome(outcome))
    return state.step, reason


def _outcome(step: int, config: RunConfig, reason: str | None) -> str:
    """Say how a run ended, in words that the batch script of a job looks for."""
    if reason is not None:
        return f"stopped by {reason}"
    return "done" if step == config.train.steps else "paused"


@contextmanager
def _told_once(control: Control) -> Iterator[None]:
    """Mark what all ranks meet together: torch reports the failure of one rank's part of a checkpoint on every rank."""
    try:
        yield
    except CheckpointError as error:
        error.repeated = not control.is_first
        raise


def _introduction(state: TrainState, layout: Layout, device: torch.device, run_dir: Path) -> Iterator[str]:
    """Say what is trained, and what of it never changes."""
    config, ranks = state.config, f", {layout.num_ranks} ranks (dp {layout.dp}, tp {layout.tp}, pp {layout.pp})"
    where = f"{device.type}{ranks if layout.num_ranks > 1 else ''}"
    yield f"{config.name}: {sum(state.sizes.values()):,} parameters on {where}, run folder {run_dir}"
    yield f"parameter groups: {group_summary(state.optimizer.groups, state.sizes)}; all of them in groups.txt"
    for level in sorted(state.levels_never_due()):
        yield f"note: level {level} is due at no step up to train.steps={config.train.steps}; its weights stay"


def _open_on_first(control: Control, stack: ExitStack, make: Callable[[], AbstractContextManager[T]]) -> T | None:
    """Enter a context on rank 0, until `stack` ends; return it there, None elsewhere. Called by all ranks."""
    opened: list[T] = []
    control.broadcast_from_rank0(lambda: opened.append(stack.enter_context(make())))
    return opened[0] if opened else None


def _throughput(config: RunConfig, layout: Layout, device: torch.device) -> Throughput:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    flops = flops_per_token(config.model, config.train.seq_len)
    return Throughput(num_devices=layout.num_ranks, flops_per_token=flops, peak_flops=peak_bf16_flops(name))
