"""Building a run from its config: device, model, data, optimizer, and the checkpoint it continues from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hopescale.checkpoint.manager import CheckpointManager, find_checkpoint
from hopescale.checkpoint.manifest import (
    Manifest,
    read_manifest,
)
from hopescale.common.errors import CheckpointError, ConfigError, Problem
from hopescale.config.fields import leaves
from hopescale.config.groups import assign_groups
from hopescale.config.layout import Layout
from hopescale.config.load import from_dict
from hopescale.config.plan import make_plan
from hopescale.config.schema import OptimConfig, RunConfig
from hopescale.config.show import (
    Change,
    diff,
    format_diff,
    identity_problems,
    is_other_place,
    meant_diff,
    model_problems,
)
from hopescale.config.values import format_value
from hopescale.cost.holdings import cut_blocks
from hopescale.data.loader import Data, open_data
from hopescale.engine.late_weights import wait_in_forward
from hopescale.engine.node_weights import defer_blocks, gather_blocks
from hopescale.models import Model
from hopescale.models.init import initialize
from hopescale.observe.health import LossWatch
from hopescale.observe.trackers import require_trackers
from hopescale.ops.device import DTYPES
from hopescale.optim import OuterOptimizer, Updater, cadences_of_level
from hopescale.optim.gram import gather_grams, linear_layers
from hopescale.optim.replicated import ReplicatedAdamW
from hopescale.optim.rules import changed_state, refuse_idle_blocks
from hopescale.optim.schedule import learning_rate
from hopescale.optim.transfer import ParameterSizes, transfer_groups
from hopescale.parallel.control import Control
from hopescale.parallel.deferred import is_deferred
from hopescale.parallel.mesh import Mesh
from hopescale.train.compiler import check_compiler, mixers_with_kernels
from hopescale.train.device_memory import RankMemory, check_device_memory, memory_of, ranks_here
from hopescale.train.folder import RunFolder
from hopescale.train.recovery import check_budget
from hopescale.train.request import RunRequest
from hopescale.train.starting_point import choose_checkpoint
from hopescale.train.state import TrainState
from hopescale.train.warm_up import compile_kernels

Report = Callable[[str], None]


def build_state(
    config: RunConfig, layout: Layout, mesh: Mesh, device: torch.device, *, draw: bool = True
) -> TrainState:
    """Build this rank's part of model and optimizer, and the data, at step 0. Called by all ranks.

    Without `draw` the weights are not set: they come from a checkpoint.

    Raises:
        ConfigError: If the model cannot fit the device's memory, or the data does not fit the config or does not last.
        DataError: If files are missing or damaged.
    """
    torch.manual_seed(config.train.seed)
    memory = memory_of(device, ranks_here(mesh.control))
    data = mesh.control.all_ranks_or_raise(lambda: _open_data(config, layout, memory))
    slices = _build_slices(config, mesh, device, config.train.seed if draw else None)
    parameters = {name: p for model in slices for name, p in model.named_parameters()}
    whole = _whole_parameters(parameters, mesh)
    shapes = {name: parameter.shape for name, parameter in whole.items()}
    tied = ["embedding.weight"] if config.model.tie_embeddings and layout.pp > 1 else []
    levels = dict(slices[0].levels())
    cadences = {
        name: cadences_of_level(config.model, level)[model.block_of(name)]
        for model in slices
        for level, names in model.level_parameters().items()
        for name in names
    }
    layers = {name: layer for model in slices for name, layer in linear_layers(model).items()}
    linear = _of_all_stages(layers, mesh)
    fused = _of_all_stages([name for name, parameter in parameters.items() if parameter.spec.parts], mesh)

    def group() -> tuple[dict[str, str], OptimConfig]:
        assigned = assign_groups(shapes, config.optim.groups, tied, linear)
        groups, optim = transfer_groups(assigned, whole, config.model, config.optim)
        refuse_idle_blocks(groups, fused, optim)
        return groups, optim

    groups, optim = mesh.control.all_ranks_or_raise(group)
    names_of_levels = [[name for model in slices for name in model.level_parameters()[level]] for level in levels]
    optimizer = OuterOptimizer(
        parameters,
        optim,
        config.train.steps,
        cadences,
        groups=groups,
        mesh=mesh,
        tied=tied,
        updater=_updater(config.parallel.stage, slices, names_of_levels, sum(map(Tensor.numel, parameters.values()))),
        levels=names_of_levels,
        shared=_shared_blocks(slices, parameters) if config.parallel.shares_weights else (),
    )
    assert not any(map(is_deferred, parameters.values())), "a parameter is in no flat tensor"
    blocks = {f"blocks.{number}.": block for model in slices for number, block in model.blocks.items()}
    gather_blocks(blocks, optimizer.node_flats())
    gather_grams(
        layers,
        [name for name, group in optimizer.groups.items() if optim.groups[group].rule == "dgd"],
        config.train.global_batch_tokens,
        whole_matrices=config.optim.tp_mode == "gather",
        mesh=mesh,
    )
    if layout.pp == 1 and layout.replicas > 1 and config.parallel.stage == 1:
        wait_in_forward(slices[0], optimizer)
    watch = LossWatch(config.train.loss_spike, config.train.norm_spike)
    return TrainState(config, slices, optimizer, data, watch, shapes)


def check_start(request: RunRequest, memory: RankMemory) -> None:
    """Check on one process what a start finds out before it builds anything. Writes nothing.

    Raises:
        ConfigError: If a tracker lacks something, memory is too small, or the data does not fit the config.
        DataError: If data is missing or damaged.
        CheckpointError: If the checkpoint to continue from, or to begin with, is missing.
    """
    config, folder = request.loaded.config, RunFolder(request.folder)
    require_trackers(config.log.trackers)
    _open_data(config, request.layout, memory)
    if choose_checkpoint(folder, request, writes=False) is None and request.init is not None:
        _same_weights(config, find_checkpoint(request.init))


def _open_data(config: RunConfig, layout: Layout, memory: RankMemory) -> Data:
    """Open the data, after a look at the device's memory: all that can be wrong before anything is built."""
    check_device_memory(config, layout, memory)
    data = open_data(config.data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size)
    data.check_budget(make_plan(config).total_sequences)
    return data


def _build_slices(config: RunConfig, mesh: Mesh, device: torch.device, seed: int | None) -> list[Model]:
    """Build the slices of the model that belong on this rank of the pipeline; None as a seed sets no weights."""
    train, pp = config.train, mesh.pp_group.size()
    slices, computed = [], {"recompute": train.recompute, "compiled": train.compile, "backend": train.backend}
    computed |= {"kernel_precision": train.kernel_precision}
    if train.compile:
        check_compiler(device)
    for blocks in cut_blocks(config.model, train.seq_len, pp * mesh.virtual_stages)[mesh.pp_group.rank() :: pp]:
        model = Model(config.model, seed=None, mesh=mesh, blocks=blocks, **computed)
        if config.parallel.shares_weights:
            defer_blocks(model, DTYPES[train.precision], device, seed)
        if seed is not None:
            initialize(model, seed, mesh)
        slices.append(model.to_precision(DTYPES[train.precision]).to(device))
    compile_kernels(slices, mixers_with_kernels(config, device), train.seq_len)
    return slices


def _updater(
    zero: int, slices: Sequence[Model], levels: Sequence[Sequence[str]], entries: int
) -> Callable[..., Updater]:
    if zero == 0:
        return ReplicatedAdamW
    from hopescale.engine.zero import ZeroAdamW

    return partial(ZeroAdamW, stage=zero, model=slices[0], levels=levels, entries=entries)


def _shared_blocks(slices: Sequence[Model], parameters: Iterable[str]) -> list[list[str]]:
    """Return the names of the parameters of each block."""
    prefixes = [f"blocks.{number}." for model in slices for number in model.blocks]
    return [[name for name in parameters if name.startswith(prefix)] for prefix in prefixes]


def _of_all_stages(names: Iterable[str], mesh: Mesh) -> list[str]:
    """Return names of this pipeline stage with those of all others, in the order of the stages."""
    return [name for of_stage in Control(mesh.pp_group).gather(list(names)) for name in of_stage]


def _whole_parameters(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> dict[str, ParameterSizes]:
    """Return shape and sizes of every parameter of the whole model, by name, in the order of the stages."""
    tp = mesh.tp_group.size()
    own = {name: ParameterSizes(p.spec.whole_shape(p.shape, tp), p.spec.sizes) for name, p in parameters.items()}
    # Other replicas and tensor-parallel ranks have the same to say.
    return {name: sizes for of_stage in Control(mesh.pp_group).gather(own) for name, sizes in of_stage.items()}


def restore(state: TrainState, checkpoint: Path, request: RunRequest, report: Report) -> None:
    """Continue `state` from a checkpoint, after comparing what a run keeps for life. Called by all ranks.

    Raises:
        ConfigError: If the config changes the run's identity, or the rule of a parameter without `reset_optimizer`, or
            the checkpoint is beyond the last step.
        CheckpointError: If the data is other data, wherever it lies, or the checkpoint is damaged.
    """
    changes = state.mesh.control.all_ranks_or_raise(lambda: _compare(state, checkpoint, request))
    if changes:
        report("changed since the checkpoint:\n" + format_diff(changes))
    state.restore(checkpoint, reset_optimizer=request.reset_optimizer)
    how = " with a new optimizer" if request.reset_optimizer else ""
    report(f"resumed from {checkpoint} at step {state.step}{how}")
    if jump := rate_jump(from_dict(read_manifest(checkpoint).config, str(checkpoint)), state.config, state.step):
        report(f"note: {jump}")


def rate_jump(old: RunConfig, new: RunConfig, step: int) -> str | None:
    """Tell a learning rate that another schedule moves from what it was to be after `step`; None for less than 5 %.

    `step` may be the last of the old schedule, whose rate then stays.
    """
    was, now = (
        learning_rate(step + 1, 1.0, config.train.steps, config.optim.schedule) * config.optim.lr
        for config in (old, new)
    )
    if step + 1 > new.train.steps or abs(now - was) <= 0.05 * was:
        return None
    times = f", {now / was:.2g} times as much" if was else ""
    return (
        f"the learning rate of step {step + 1} is {now:.3g} instead of {was:.3g}{times}: the schedule is now that of "
        f"train.steps={new.train.steps} and optim.lr={new.optim.lr:g}, and was that of {old.train.steps} and "
        f"{old.optim.lr:g}"
    )


def begin_from(state: TrainState, checkpoint: Path, report: Report) -> None:
    """Begin `state` with the weights of a checkpoint of an equal model, whatever it has read. Called by all ranks.

    Chunks of memories and resets may be others: what changes is reported.

    Raises:
        ConfigError: If its model is another.
        CheckpointError: If it is damaged, or of another precision.
    """
    manifest, changes = state.mesh.control.all_ranks_or_raise(lambda: _same_weights(state.config, checkpoint))
    state.begin_from(checkpoint)
    report(f"weights from {checkpoint}, which is at step {manifest.step}")
    if changes:
        report("its memories had another pace:\n" + format_diff(changes))


def _same_weights(config: RunConfig, checkpoint: Path) -> tuple[Manifest, list[Change]]:
    """Return the manifest of a checkpoint whose weights fit, and how memories are written otherwise."""
    manifest = read_manifest(checkpoint)
    old = from_dict(manifest.config, str(checkpoint))
    if problems := model_problems(old, config, str(checkpoint), weights_alone=True):
        raise ConfigError(problems)
    return manifest, [change for change in meant_diff(old, config) if change[0].startswith("model.mixers.")]


def _compare(state: TrainState, checkpoint: Path, request: RunRequest) -> list[Change]:
    """Return the changes of the config, if they are allowed."""
    manifest, reset_optimizer = read_manifest(checkpoint), request.reset_optimizer
    old = from_dict(manifest.config, str(checkpoint))
    if "data" not in manifest.identity:
        hint = f"begin a run with its weights: --init {checkpoint}, in another --run-dir"
        raise CheckpointError(f"{checkpoint} was never trained by hopescale, and belongs to no data", hint)
    if not reset_optimizer and not any(name.startswith("optimizer.") for name in manifest.tensors):
        hint = "continue with a new optimizer: --reset-optimizer, once"
        raise CheckpointError(f"{checkpoint} holds weights alone, and no state of an optimizer", hint)
    problems = identity_problems(old, state.config)
    if problems or (not reset_optimizer and (problems := _changed_optimizer(old, state))):
        raise ConfigError(problems)
    if manifest.identity["data"] != state.data.fingerprint:
        hint = "prepare new text into a new folder, and begin a new run with it"
        moved = format_diff([change for change in diff(old, state.config) if is_other_place(change)])
        how = moved.replace("\n", ", ") or "its path is the same"
        now, then = state.data.fingerprint[:12], manifest.identity["data"][:12]
        message = f"the data is not what {checkpoint} was trained on: its fingerprint is {now}, not {then} ({how})"
        raise CheckpointError(message, hint)
    if order := state.data.other_order(old.data):
        hint = f"write them as in {checkpoint / 'manifest.json'}"
        raise CheckpointError(f"{order} in {checkpoint}: samples would come at other steps", hint)
    if manifest.step > state.config.train.steps:
        hint = "set train.steps higher"
        steps = state.config.train.steps
        raise ConfigError(f"{checkpoint} is at step {manifest.step}, beyond train.steps={steps}", hint)
    if manifest.step > request.last_step:
        raise ConfigError(f"--stop-at is {request.last_step}, but {checkpoint} is already at step {manifest.step}")
    check_budget(state, manifest.progress.get("recovery", {}).get("passed_steps", 0))
    return meant_diff(old, state.config)


def _changed_optimizer(old: RunConfig, state: TrainState) -> list[Problem]:
    """List the groups with a parameter whose state in the checkpoint is of another rule, or of another kind."""
    groups = state.config.optim.groups
    present, before = (assign_groups(state.shapes, config.optim.groups) for config in (state.config, old))
    hint = "set it back, or continue with the weights alone: --reset-optimizer, once"
    problems: dict[tuple[str, str], Problem] = {}
    for parameter, group in present.items():
        rule, old_rule = groups[group].rule, old.optim.groups[before[parameter]].rule
        if rule != old_rule:
            message = f"is {rule}, but {parameter} was updated by {old_rule}, whose state the checkpoint holds"
            problems.setdefault((group, old_rule), Problem(f"optim.groups.{group}.rule", message, hint=hint))
            continue
        for key in changed_state(rule, old.optim, state.config.optim):
            was, now = (format_value(leaves(config)[key]) for config in (old, state.config))
            message = f"is {now}, but the checkpoint holds the state of {rule} with {was}"
            problems.setdefault((key, ""), Problem(key, message, hint=hint))
    return [*problems.values(), *_changed_cadences(old, state.config)]


def _changed_cadences(old: RunConfig, new: RunConfig) -> list[Problem]:
    """List what a level must keep whose blocks may have counted apart, or whose sums may be on their way."""
    hint, problems = "set it back, or continue with the weights alone: --reset-optimizer, once", []
    for name, level in new.model.cms.levels.items():
        was = old.model.cms.levels[name]
        keys = ("rolling", "update_every_steps") if level.rolling or was.rolling else ()
        for key in ("lag", "phase", *(keys or ("update_every_steps",))) if level.lag or was.lag else keys:
            before, after = getattr(was, key), getattr(level, key)
            if before != after:
                was_with = f"but the checkpoint holds the state of updates with {format_value(before)}"
                message = f"is {format_value(after)}, {was_with}"
                problems.append(Problem(f"model.cms.levels.{name}.{key}", message, hint=hint))
    return problems


def open_checkpoints(folder: RunFolder, state: TrainState) -> CheckpointManager:
    """Open the run's checkpoints for writing, each with a copy of the tokenizer. Called by all ranks.

    Raises:
        CheckpointError: If the folder cannot be prepared.
        LaunchError: If the tokenizer cannot be copied into the run folder.
    """
    tokenizer = state.mesh.control.broadcast_from_rank0(lambda: folder.keep_tokenizer(state.data.tokenizer))
    settings = state.config.checkpoint
    return CheckpointManager(folder.checkpoints, settings, tokenizer=tokenizer, group=state.checkpoint_group)
