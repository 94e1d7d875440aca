"""One process of a training run, from a checked config to its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch

from hopescale.checkpoint.manager import find_checkpoint
from hopescale.common.errors import CheckpointError, StoppedEarly
from hopescale.common.rank_info import RankInfo
from hopescale.config.execution import kernel_products, memory_shape
from hopescale.config.groups import group_summary, group_table
from hopescale.config.notes import notes
from hopescale.config.schema import RunConfig
from hopescale.config.show import config_facts
from hopescale.observe.trackers import require_trackers
from hopescale.parallel import process
from hopescale.parallel.control import Control
from hopescale.parallel.init_distributed import init_distributed
from hopescale.parallel.mesh import Mesh
from hopescale.train.compiler import choose_backends, mixers_with_kernels
from hopescale.train.device_memory import (
    RankMemory,
    least_of_all,
    memory_errors_explained,
    memory_of,
    ranks_here,
    tight_memory,
)
from hopescale.train.folder import Record, RunFolder
from hopescale.train.in_memory import continue_from_memory, open_memory
from hopescale.train.micro_batch import settle_micro_batch
from hopescale.train.profile import StepProfiler
from hopescale.train.request import RunRequest
from hopescale.train.setup import (
    Report,
    begin_from,
    build_state,
    open_checkpoints,
    restore,
)
from hopescale.train.starting_point import choose_checkpoint, finds_weights
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest
from hopescale.train.trainer import Trainer

T = TypeVar("T")


def train(request: RunRequest, *, rank_info: RankInfo | None = None, stop: StopRequest, report: Report) -> None:
    """Meet the other ranks, then train a run, or continue it, until its last step. Called by every rank.

    Args:
        request: The run, and how to start it.
        rank_info: Rank of this process; None is the only one.
        stop: Request to stop, read between steps; the caller installs its handlers before the slow imports.
        report: Function that takes each line meant for a person; every rank has the same ones.

    Raises:
        StoppedEarly: If a signal ended the run before its time; it has been saved.
        HopescaleError: Whatever else a user can cause.
    """
    config = request.loaded.config
    timeout = timedelta(seconds=config.parallel.first_step_timeout_s)
    facts = request.facts() | config_facts(config)
    mesh, device = init_distributed(
        rank_info, request.layout, config.train.device, "train.device", facts, timeout=timeout
    )
    step, reason = train_on(mesh, device, request, stop, report)
    if rank_info is not None:
        process.stop()
    where = f"step {step} of {config.train.steps}"
    if reason is not None:
        saved = "the state is saved" if step else "there was nothing to save yet"
        again = "" if request.resume in ("auto", "must") else " with --resume auto"
        raise StoppedEarly(f"{reason} at {where}; {saved}", f"the same command{again} continues the run")
    report(f"done: {where}" if step == config.train.steps else f"stopped at {where}, as --stop-at asked")


def train_on(
    mesh: Mesh, device: torch.device, request: RunRequest, stop: StopRequest, report: Report
) -> tuple[int, str | None]:
    """Train on ranks that have met; the arguments are as of `train`.

    Returns:
        The last step done, and the name of the signal that ended the run before its time or None.
    """
    control, asked, folder = mesh.control, request.loaded, RunFolder(request.folder)
    control.broadcast_from_rank0(lambda: require_trackers(asked.config.log.trackers))
    is_new = not control.broadcast_from_rank0(lambda: finds_weights(folder, request))
    if compiled := mixers_with_kernels(asked.config, device):
        report(f"the start compiles the kernels of {' and '.join(compiled)}: minutes, if Triton's cache lacks them")
    with memory_errors_explained(asked.config):
        state = build_state(asked.config, request.layout, mesh, device, draw=is_new)
    with ExitStack() as stack, _reported_once(control):
        _open_on_first(control, stack, lambda: folder)
        checkpoint = control.broadcast_from_rank0(lambda: choose_checkpoint(folder, request))
        room = least_of_all(control, memory_of(device, ranks_here(control)))
        request, chosen = control.broadcast_from_rank0(partial(settle_micro_batch, request, checkpoint, room))
        config = request.loaded.config
        state.settle(config)
        stack.enter_context(memory_errors_explained(config))
        memory = open_memory(state, folder.checkpoints)
        is_latest = request.resume in ("auto", "must") and not request.reset_optimizer
        from_memory = is_latest and memory is not None and continue_from_memory(state, memory, checkpoint, report)
        if checkpoint is not None and not from_memory:
            restore(state, checkpoint, request, report)
        elif request.init is not None and not from_memory:
            begin_from(state, control.broadcast_from_rank0(lambda: find_checkpoint(request.init)), report)
        elif not is_new and not from_memory:
            raise CheckpointError(f"the checkpoints of {folder.path} have gone while the run started", "start it again")
        table = group_table(state.optimizer.groups, state.sizes, state.optimizer.peak_rates())
        control.broadcast_from_rank0(lambda: folder.describe(request, asked, table))
        if memory is not None and not from_memory:
            memory.renew()  # not earlier: a start that is refused leaves nothing in a folder that is not ours yet
        checkpoints = open_checkpoints(folder, state)
        for line in [*_introduction(state, request, room), *([chosen] if chosen else [])]:
            report(line)
        resume_step = None if checkpoint is None and not from_memory else state.step
        record = _open_on_first(control, stack, lambda: Record(folder, config, resume_step=resume_step))
        profiler = None
        if request.profile is not None and control.is_first:
            profiler = stack.enter_context(StepProfiler(folder.path / "profile", request.profile, device, report))
        trainer = Trainer(state, request.layout, checkpoints, record, device, report, profiler, memory)
        if from_memory:
            trainer.save()
        reason = trainer.run(request.last_step, stop)
        outcome = f"{_outcome(state.step, config, reason)} at step {state.step} of {config.train.steps}"
        control.broadcast_from_rank0(lambda: folder.note_outcome(outcome))
    return state.step, reason


def _outcome(step: int, config: RunConfig, reason: str | None) -> str:
    """Say how a run ended, in words that the batch script of a job looks for."""
    if reason is not None:
        return f"stopped by {reason}"
    return "done" if step == config.train.steps else "paused"


@contextmanager
def _reported_once(control: Control) -> Iterator[None]:
    """Let one rank report a checkpoint's failure: torch raises that of one rank's part on every rank."""
    try:
        yield
    except CheckpointError as error:
        error.repeated = not control.is_first
        raise


def _introduction(state: TrainState, request: RunRequest, room: RankMemory) -> Iterator[str]:
    """Say what is trained, and what of the config it will not come to."""
    config, layout, device = state.config, request.layout, room.device
    shared = f", cp {layout.cp}" if layout.cp > 1 else ""
    ranks = f", {layout.num_ranks} ranks (dp {layout.dp}, tp {layout.tp}, pp {layout.pp}{shared})"
    where = f"{device.type}{ranks if layout.num_ranks > 1 else ''}"
    yield f"{config.name}: {sum(state.sizes.values()):,} parameters on {where}, run folder {request.folder}"
    groups = group_summary(state.optimizer.groups, state.sizes)
    yield f"parameter groups: {groups}; listed in {request.folder / 'groups.txt'}"
    chosen = choose_backends(config, device)
    for name, backend in chosen.items():
        whose = f" of {name}" if len(chosen) > 1 else ""
        shape = memory_shape(config.model, config.model.mixers[name])
        yield f"memories{whose}: {backend.describe(shape, kernel_products(config.train))}"
    tight = tight_memory(config, layout, room)
    for note in [*notes(config), *_not_validated(state), *([tight] if tight else [])]:
        yield f"note: {note}"


def _not_validated(state: TrainState) -> Iterator[str]:
    """Name the sources of which nothing is held out, where the config asks for validations."""
    sources = [name for name, source in state.config.data.sources.items() if source is not None]
    missing = [name for name in sources if name not in state.data.validation_sets]
    if state.config.train.validation.every is not None and missing:
        yield f"nothing is held out of {', '.join(missing)}: there is no validation loss of it"


def _open_on_first(control: Control, stack: ExitStack, make: Callable[[], AbstractContextManager[T]]) -> T | None:
    """Enter a context on rank 0, until `stack` ends; return it there, None elsewhere. Called by all ranks."""
    opened: list[T] = []
    control.broadcast_from_rank0(lambda: opened.append(stack.enter_context(make())))
    return opened[0] if opened else None
