"""Checks of `train` and `checkpoint`: batches, backends, recomputation, recovery."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest, set_keys
from hopescale.config.execution import memory_backend, reverse_saves
from hopescale.config.model_shape import has_chunk_loop, head_dim, projection_chunk_size, self_modifying_mixers
from hopescale.config.schema import RunConfig
from hopescale.config.schema.titans import TitansConfig


def batch_is_whole_micro_batches(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A step is a whole number of forward passes on every data-parallel replica."""
    train, dp = config.train, config.parallel.dp or 1
    unit, tokens = train.seq_len * train.micro_batch_size * dp, train.global_batch_tokens
    if leaves_rest(tokens, unit):
        product = f"seq_len * micro_batch_size = {train.seq_len} * {train.micro_batch_size} = {unit}"
        if dp > 1:
            factors = f"{train.seq_len} * {train.micro_batch_size} * {dp}"
            product = f"seq_len * micro_batch_size * parallel.dp = {factors} = {unit}"
        near = [str(count) for count in (tokens // unit * unit, tokens // unit * unit + unit) if count]
        rows, rest = divmod(tokens, train.seq_len * dp)
        smaller = next((size for size in range(train.micro_batch_size, 0, -1) if rest == 0 and rows % size == 0), 0)
        hint = f"train.micro_batch_size={smaller} divides it; otherwise " if smaller else ""
        hint += f"nearest: {' and '.join(near)}"
        yield Problem("train.global_batch_tokens", f"{tokens} is not a multiple of {product}", hint=hint)


def kept_checkpoints_are_written(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A checkpoint that is kept for ever is one that is written."""
    key, every, keep = "checkpoint.keep_every", config.checkpoint.every, config.checkpoint.keep_every
    if keep is not None and every is None:
        yield Problem(key, f"{keep} has no effect: checkpoint.every is null")
    elif keep is not None and leaves_rest(keep, every):
        yield Problem(key, f"{keep} is not a multiple of checkpoint.every = {every}: no checkpoint is written there")
    for step in config.checkpoint.keep_at:
        if step > config.train.steps:
            message = f"{step} is beyond train.steps = {config.train.steps}: no checkpoint is written there"
            yield Problem("checkpoint.keep_at", message)


def backend_can_run(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A backend can run the memories on a suitable machine; attention has one implementation."""
    train, memories = config.train, self_modifying_mixers(config.model)
    if train.backend != "auto" and not memories:
        kinds = " and ".join(sorted({mixer.kind for mixer in config.model.mixers.values()}))
        yield Problem("train.backend", f"{train.backend} has no effect: mixers are {kinds}", hint="leave it at auto")
    for name, mixer in memories.items() if config.model.num_heads > 0 else ():
        choice = memory_backend(config, mixer)
        if choice.backend is None:
            message = f"{train.backend} cannot run model.mixers.{name}: {choice.reason}"
            yield Problem("train.backend", message, hint="leave it at auto")


def kernels_can_have_a_precision(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Only Triton kernels have products of several kinds."""
    train, key = config.train, "train.kernel_precision"
    if train.kernel_precision == "auto" or config.model.num_heads <= 0:
        return
    device = None if train.device == "auto" else train.device
    chosen = [memory_backend(config, mixer, device) for mixer in self_modifying_mixers(config.model).values()]
    if not any(choice.backend == "triton" for choice in chosen):
        why = next((f"memories run in {each.backend}" for each in chosen if each.backend), "no mixer has memories")
        message = f"{train.kernel_precision} has no effect: {why}, and it is about Triton kernels"
        yield Problem(key, message, hint="leave it at auto")


def chunks_can_be_compiled_or_reversed(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Only a chunk loop is compiled, and only where chunks write less than they write to are states found again."""
    model, train, key = config.model, config.train, "train.recompute"
    reverse = train.recompute == "reverse" and model.num_heads > 0
    loops = {name: mixer for name, mixer in model.mixers.items() if has_chunk_loop(mixer)}
    if not loops:
        why = "has no effect: no mixer has a chunk loop, which writes what depends on what memories hold"
        if train.compile:
            yield Problem("train.compile", f"true {why}", hint="leave it false")
        if reverse:
            yield Problem(key, f"reverse {why}", hint="set it to none, memory or block")
    prefixed = [mixer for mixer in loops.values() if isinstance(mixer, TitansConfig) and mixer.composition != "mac"]
    uneven = {
        "model.within_documents": model.within_documents,
        "reset_every": any(mixer.reset_every for mixer in loops.values()),
        f"parallel.cp = {config.parallel.cp} and MAG or MAL": config.parallel.cp > 1 and prefixed,
    }
    if train.compile and (uneven_by := [name for name, is_so in uneven.items() if is_so]):
        message = f"true does not go with {uneven_by[0]}: chunks of every size and number would each be compiled"
        yield Problem("train.compile", message, hint="leave it false")
    for name, mixer in loops.items() if reverse else ():
        chunk = projection_chunk_size(mixer)
        size = f"model.mixers.{name}.{'projection_chunk_size' if mixer.projection_chunk_size else 'chunk_size'}"
        if not reverse_saves(model, mixer):
            message = f"reverse has no effect: what {size} = {chunk} tokens write is not less than what they write to"
            hint = f"set it to chunks, or {size} well below the head dim, {head_dim(model)}"
            yield Problem(key, message, hint=hint)
        elif train.seq_len <= chunk:
            message = f"reverse has no effect: train.seq_len = {train.seq_len} is one chunk, {size} = {chunk}"
            yield Problem(key, message, hint="set it to chunks")


def recovery_has_an_effect(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """`rate_factor` needs `then: lower_rate`, and a run that goes back needs checkpoints to go back to."""
    recovery, key = config.train.recovery, "train.recovery"
    idle = {"rate_factor": recovery.then != "lower_rate", "max_returns": recovery.then == "stop"}
    for name in (name for name, is_idle in idle.items() if is_idle and set_keys(config, origins, f"{key}.{name}")):
        value = getattr(recovery, name)
        yield Problem(f"{key}.{name}", f"{value} has no effect: {key}.then is {recovery.then}", hint="leave it out")
    if recovery.then != "stop" and config.checkpoint.every is None:
        message = f"{recovery.then} has nothing to go back to: checkpoint.every is null"
        yield Problem(f"{key}.then", message, hint="set checkpoint.every, or leave it at stop")


def samples_are_written(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Samples belong to validations, and need a rank with the whole model."""
    log, parallel = config.log, config.parallel
    if not log.samples:
        if set_keys(config, origins, "log.sample_tokens"):
            yield Problem("log.sample_tokens", f"{log.sample_tokens} has no effect: log.samples is empty")
        return
    if config.train.validation.every is None:
        message = "has no effect: samples are written at validations, and train.validation.every is null"
        yield Problem("log.samples", message, hint="set train.validation.every, or leave it empty")
    degrees = {"parallel.tp": parallel.tp, "parallel.pp": parallel.pp, "parallel.zero": parallel.zero}
    for key, value in degrees.items():
        if value is not None and value > (2 if key == "parallel.zero" else 1):
            message = f"needs a rank that holds the whole model, but {key} is {value}"
            yield Problem("log.samples", message, hint="leave it empty")


def copies_are_read(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Copies on the nodes are of prepared data sets."""
    if config.data.staged is not None and all(source.path is None for source in config.data.sources.values()):
        message = f"{config.data.staged} has no effect: no source is a folder or an address"
        yield Problem("data.staged", message, hint="leave it null")


def memory_is_used(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Checkpoints in memory lie between those on disk."""
    memory, every = config.checkpoint.memory, config.checkpoint.every
    key = "checkpoint.memory"
    if memory.every is None:
        for name in set_keys(config, origins, f"{key}.folder"):
            yield Problem(name, f"has no effect: {key}.every is null", hint="leave it out")
    elif every is not None and memory.every >= every:
        message = f"{memory.every} is not below checkpoint.every = {every}: the disk has every step"
        yield Problem(f"{key}.every", message, hint="save to memory more often, or leave it null")


CHECKS: tuple[Check, ...] = (
    samples_are_written,
    copies_are_read,
    recovery_has_an_effect,
    batch_is_whole_micro_batches,
    kept_checkpoints_are_written,
    memory_is_used,
    backend_can_run,
    kernels_can_have_a_precision,
    chunks_can_be_compiled_or_reversed,
)
