"""What the values of a config mean together. One rule is one function; all that is wrong is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.config import (
    check_backend,
    check_optim,
    check_parallel,
    check_recompute,
    check_transfer,
    model_shape,
)
from hopescale.config.check_base import Check, Origins, leaves_rest, levels_of, set_keys
from hopescale.config.fields import leaves, numbers
from hopescale.config.layout import Layout
from hopescale.config.load import DEFAULT, LoadedConfig
from hopescale.config.schema import RopeScalingConfig, RunConfig
from hopescale.config.values import format_value

SYNTHETIC_MARKERS = 2
"""Symbols of the vocabulary that a synthetic task needs beside its own."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(config: RunConfig, origins: Origins | None = None) -> list[Problem]:
    """Return everything wrong with a config, each with the origin of its value.

    Args:
        config: A config whose types are right, as loading leaves it.
        origins: Origin of each key, as loading returns it. Missing keys count as defaults.
    """
    origins = origins or {}
    problems = [problem for each in CHECKS for problem in each(config, origins)]
    return [replace(problem, origin=_origin(problem.key, origins)) for problem in problems]


def require_valid(loaded: LoadedConfig) -> LoadedConfig:
    """Return a loaded recipe unchanged.

    Raises:
        ConfigError: With every check it fails.
    """
    if problems := check(loaded.config, loaded.origins):
        raise ConfigError(problems)
    return loaded


def check_layout(config: RunConfig, layout: Layout, origins: Origins | None = None) -> None:
    """Check a config again, now that the number of ranks has decided the degree it left open.

    Args:
        config: A config that has passed its checks.
        layout: The degrees of its axes.
        origins: Origins of the keys, as for `check`.

    Raises:
        ConfigError: With everything that does not split as the layout says.
    """
    decided = replace(config.parallel, **asdict(layout))
    if problems := check(replace(config, parallel=decided), origins):
        raise ConfigError(problems)


def _origin(key: str, origins: Origins) -> str | None:
    origin = origins.get(key)
    return None if origin == DEFAULT else origin


def numbers_in_range(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Every number lies in the range that its field says."""
    for key, value, interval in numbers(config):
        for number in value if isinstance(value, tuple) else (value,):
            if number not in interval:
                yield Problem(key, f"must be {interval}, is {number:g}")


def name_is_a_folder(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The run's name can name its folder."""
    if not _FOLDER_NAME.fullmatch(config.name):
        yield Problem("name", f"{config.name!r} cannot name a folder", hint="use letters, digits, '.', '_' and '-'")


# model


def heads_divide_width(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Without a head dim of their own, heads share the width evenly."""
    model = config.model
    if model.head_dim is None and leaves_rest(model.d_model, model.num_heads):
        message = f"{model.d_model} is not a multiple of num_heads = {model.num_heads}"
        yield Problem("model.d_model", message, hint="change either, or set model.head_dim")


def rotary_head_dim_is_even(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Rotary positions turn pairs of channels."""
    if config.model.mixer != "attention" or config.model.num_heads < 1:
        return
    head_dim = model_shape.head_dim(config.model)
    if head_dim % 2:
        yield Problem("model.head_dim", f"attention needs an even head dim, it is {head_dim}")


def kv_heads_divide_heads(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Each head of keys and values serves equally many heads of queries."""
    model = config.model
    if model.mixer == "attention" and leaves_rest(model.num_heads, model_shape.kv_heads(model)):
        message = f"{model.attention.num_kv_heads} does not divide model.num_heads = {model.num_heads}"
        yield Problem("model.attention.num_kv_heads", message)


def rope_ramp_belongs_to_llama3(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The ramp between slowed and other frequencies has two ends, and only one kind of scaling has it."""
    prefix, scaling = "model.attention.rope_scaling", config.model.attention.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "linear":
        for name in ("low_freq_factor", "high_freq_factor", "first_context"):
            if getattr(scaling, name) != getattr(RopeScalingConfig(), name):
                yield Problem(f"{prefix}.{name}", "has no effect: kind is linear", hint="leave it out")
    elif scaling.low_freq_factor >= scaling.high_freq_factor:
        message = f"{scaling.high_freq_factor:g} is not above low_freq_factor = {scaling.low_freq_factor:g}"
        yield Problem(f"{prefix}.high_freq_factor", message)


def only_the_selected_mixer_is_set(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Keys of the mixer that is not selected would do nothing."""
    other = {"self_modifying": "attention", "attention": "self_modifying"}[config.model.mixer]
    for key in set_keys(config, origins, f"model.{other}"):
        default = format_value(leaves(RunConfig()).get(key))
        message = f"has no effect: model.mixer is {config.model.mixer}"
        yield Problem(key, message, hint=f"set it back to its default with {key}={default}, or set model.mixer={other}")


def memory_dim_needs_mlp(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A linear memory has no hidden width."""
    mixer = config.model.self_modifying
    if mixer.memory_dim is not None and mixer.memory != "mlp":
        message = f"{mixer.memory_dim} has no effect: memory is {mixer.memory}"
        yield Problem("model.self_modifying.memory_dim", message, hint="leave it null, or set memory to mlp")


def adaptive_is_a_set(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A projection is a memory or is not."""
    adaptive = config.model.self_modifying.adaptive
    for name in sorted({name for name in adaptive if adaptive.count(name) > 1}):
        yield Problem("model.self_modifying.adaptive", f"{name} is listed {adaptive.count(name)} times")


def adaptive_alpha_needs_retention(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Without retention there is no alpha to adapt."""
    mixer = config.model.self_modifying
    if "alpha" in mixer.adaptive and not mixer.retention:
        hint = f"use adaptive: [{', '.join(name for name in mixer.adaptive if name != 'alpha')}]"
        yield Problem("model.self_modifying.adaptive", "holds alpha, but retention is off", hint=hint)


def value_targets_need_static_maps(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The value can be the target only of a memory as wide as the value."""
    mixer = config.model.self_modifying
    if mixer.targets == "value" and (mixer.adaptive or mixer.query != "static"):
        message = f"value needs adaptive: [] and query: static, they are {list(mixer.adaptive)} and {mixer.query}"
        yield Problem("model.self_modifying.targets", message)


def projection_chunks_hold_whole_chunks(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Projection memories move at boundaries of the main memory."""
    mixer = config.model.self_modifying
    key, size = "model.self_modifying.projection_chunk_size", mixer.projection_chunk_size
    if size is None:
        return
    if leaves_rest(size, mixer.chunk_size):
        yield Problem(key, f"{size} is not a multiple of chunk_size = {mixer.chunk_size}")
    if not mixer.adaptive and mixer.query == "static":
        yield Problem(key, f"{size} has no effect: no projection is a memory", hint="leave it null")


def gate_starts_need_their_gates(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A gate that is switched off has no first value."""
    mixer = config.model.self_modifying
    switches = {"mu_init": ("momentum", mixer.momentum), "alpha_init": ("retention", mixer.retention)}
    for name, (switch, on) in switches.items():
        if not on:
            for key in set_keys(config, origins, f"model.self_modifying.{name}"):
                yield Problem(key, f"has no effect: {switch} is off", hint=f"leave it out, or turn {switch} on")


def error_cap_needs_l2(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The inner product has no error to cap."""
    mixer = config.model.self_modifying
    if mixer.error_cap is not None and mixer.objective != "l2":
        message = f"{mixer.error_cap:g} has no effect: objective is {mixer.objective}"
        yield Problem("model.self_modifying.error_cap", message, hint="leave it null, or set objective to l2")


def at_least_one_level(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A block has a level after its mixer."""
    if not config.model.cms.levels:
        yield Problem("model.cms.levels", "no level", hint="one level of period 1 is a plain MLP")


def levels_over_depth_are_alike(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """One level per block needs a block for each, of one cost, in one chain, on one stage."""
    model, key = config.model, "model.cms.placement"
    if model.cms.placement != "depth":
        return
    levels = levels_of(config)
    widths = sorted({level.d_ff for _, level in levels})
    if len(widths) > 1:
        yield Problem(key, f"depth needs levels of one d_ff, they have {', '.join(map(str, widths))}")
    if 0 < model.num_layers < len(levels):
        yield Problem(key, f"depth needs a block for each level: {model.num_layers} blocks, {len(levels)} levels")
    if model.cms.variant != "sequential":
        yield Problem("model.cms.variant", f"{model.cms.variant} has no effect: a block has one level")
    if config.parallel.pp is not None and config.parallel.pp > 1:
        yield Problem(key, f"depth needs parallel.pp of 1, it is {config.parallel.pp}: every stage has all levels")


def phase_lies_in_the_period(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A phase shifts a level within its period."""
    for name, level in levels_of(config):
        if level.phase >= level.update_every_steps:
            message = f"{level.phase} is not below update_every_steps = {level.update_every_steps}"
            yield Problem(f"model.cms.levels.{name}.phase", message)


# data


def at_least_one_source(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A run reads something."""
    if not config.data.sources:
        hint = "set data.sources.main.path to a folder written by `hopescale data prepare`"
        yield Problem("data.sources", "no source", hint=hint)


def a_source_is_one_thing(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A source is a folder or synthetic, not both and not neither."""
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        if source.path is not None and source.synthetic is not None:
            yield Problem(key, "has both path and synthetic", hint=f"set {key}.path=null or {key}.synthetic=null")
        if source.path is None and source.synthetic is None:
            yield Problem(key, "has neither path nor synthetic", hint=f"set {key}.path, or remove it: {key}=null")
        if source.path == "":
            yield Problem(f"{key}.path", "is empty")


def symbols_fit_the_vocabulary(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A synthetic task's symbols and markers are entries of the vocabulary."""
    for name, source in config.data.sources.items():
        if source.synthetic is None:
            continue
        needed = source.synthetic.num_symbols + SYNTHETIC_MARKERS
        if needed > config.model.vocab_size:
            symbols = f"{source.synthetic.num_symbols} symbols and {SYNTHETIC_MARKERS} markers"
            message = f"{symbols} exceed model.vocab_size = {config.model.vocab_size}"
            yield Problem(f"data.sources.{name}.synthetic.num_symbols", message)


# optim


def one_group_takes_the_rest(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Every parameter belongs to a group: exactly one group has no pattern, and takes what is left."""
    rest = [name for name, group in config.optim.groups.items() if group.match is None]
    if len(rest) != 1:
        message = f"{len(rest)} groups have match: null ({', '.join(rest) or 'none'}), exactly one must"
        yield Problem("optim.groups", message, hint="that group takes all parameters no other group matches")


def patterns_are_not_empty(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A group with an empty list of patterns would hold nothing."""
    for name, group in config.optim.groups.items():
        if group.match is not None and not all(group.match or [""]):
            hint = f"remove the group with optim.groups.{name}=null"
            yield Problem(f"optim.groups.{name}.match", "holds no pattern, or an empty one", hint=hint)


def decay_fraction_needs_wsd(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A cosine has no separate decay."""
    if config.optim.schedule.name != "wsd":
        for key in set_keys(config, origins, "optim.schedule.decay_fraction"):
            yield Problem(key, f"has no effect: schedule.name is {config.optim.schedule.name}", hint="leave it out")


def mean_needs_a_slow_level(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Over one step, sum and mean are the same."""
    if all(level.update_every_steps <= 1 for _, level in levels_of(config)):
        for key in set_keys(config, origins, "optim.accumulate"):
            message = f"{config.optim.accumulate} has no effect: no level has update_every_steps above 1"
            yield Problem(key, message, hint="leave it out")


# train, checkpoint


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
        hint = f"nearest: {' and '.join(near)}"
        yield Problem("train.global_batch_tokens", f"{tokens} is not a multiple of {product}", hint=hint)


def kept_checkpoints_are_written(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A checkpoint that is kept for ever is one that is written."""
    key, every, keep = "checkpoint.keep_every", config.checkpoint.every, config.checkpoint.keep_every
    if keep is not None and every is None:
        yield Problem(key, f"{keep} has no effect: checkpoint.every is null")
    elif keep is not None and leaves_rest(keep, every):
        yield Problem(key, f"{keep} is not a multiple of checkpoint.every = {every}: no checkpoint is written there")


CHECKS: tuple[Check, ...] = (
    numbers_in_range,
    name_is_a_folder,
    heads_divide_width,
    rotary_head_dim_is_even,
    kv_heads_divide_heads,
    rope_ramp_belongs_to_llama3,
    only_the_selected_mixer_is_set,
    memory_dim_needs_mlp,
    adaptive_is_a_set,
    adaptive_alpha_needs_retention,
    value_targets_need_static_maps,
    projection_chunks_hold_whole_chunks,
    gate_starts_need_their_gates,
    error_cap_needs_l2,
    at_least_one_level,
    levels_over_depth_are_alike,
    phase_lies_in_the_period,
    at_least_one_source,
    a_source_is_one_thing,
    symbols_fit_the_vocabulary,
    one_group_takes_the_rest,
    patterns_are_not_empty,
    decay_fraction_needs_wsd,
    mean_needs_a_slow_level,
    batch_is_whole_micro_batches,
    kept_checkpoints_are_written,
    *check_backend.CHECKS,
    *check_optim.CHECKS,
    *check_parallel.CHECKS,
    *check_recompute.CHECKS,
    *check_transfer.CHECKS,
)
