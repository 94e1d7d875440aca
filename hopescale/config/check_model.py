"""Checks of `model` and `data`."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest, set_keys
from hopescale.config.fields import leaves
from hopescale.config.model_shape import head_dim, kv_heads
from hopescale.config.schema import RopeScalingConfig, RunConfig
from hopescale.config.values import format_value

SYNTHETIC_MARKERS = 2
"""Symbols of the vocabulary that a synthetic task needs beside its own."""


def heads_divide_the_width(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Heads without a width of their own share the model's evenly."""
    model = config.model
    if model.head_dim is None and leaves_rest(model.d_model, model.num_heads):
        message = f"{model.d_model} is not a multiple of num_heads = {model.num_heads}"
        yield Problem("model.d_model", message, hint="change either, or set model.head_dim")


def only_the_selected_mixer_is_set(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Keys of the mixer that is not selected would do nothing."""
    other = {"self_modifying": "attention", "attention": "self_modifying"}[config.model.mixer]
    for key in set_keys(config, origins, f"model.{other}"):
        default = format_value(leaves(RunConfig()).get(key))
        message = f"has no effect: model.mixer is {config.model.mixer}"
        yield Problem(key, message, hint=f"set it back to its default with {key}={default}, or set model.mixer={other}")


def attention(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Rotary positions turn pairs of channels, and each head of keys serves equally many heads of queries."""
    model, key, scaling = config.model, "model.attention", config.model.attention.rope_scaling
    if model.mixer == "attention":
        if model.num_heads > 0 and head_dim(model) % 2:
            yield Problem("model.head_dim", f"attention needs an even head dim, it is {head_dim(model)}")
        if leaves_rest(model.num_heads, kv_heads(model)):
            message = f"{model.attention.num_kv_heads} does not divide model.num_heads = {model.num_heads}"
            yield Problem(f"{key}.num_kv_heads", message)
    if scaling is not None and scaling.kind == "linear":
        for name in ("low_freq_factor", "high_freq_factor", "first_context"):
            if getattr(scaling, name) != getattr(RopeScalingConfig(), name):
                yield Problem(f"{key}.rope_scaling.{name}", "has no effect: kind is linear", hint="leave it out")
    elif scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        message = f"{scaling.high_freq_factor:g} is not above low_freq_factor = {scaling.low_freq_factor:g}"
        yield Problem(f"{key}.rope_scaling.high_freq_factor", message)


def memories(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A projection is a memory or is not, and what is a memory has what it needs."""
    mixer, key = config.model.self_modifying, "model.self_modifying"
    adaptive = mixer.adaptive
    if mixer.memory_dim is not None and mixer.memory != "mlp":
        message = f"{mixer.memory_dim} has no effect: memory is {mixer.memory}"
        yield Problem(f"{key}.memory_dim", message, hint="leave it null, or set memory to mlp")
    for name in sorted({name for name in adaptive if adaptive.count(name) > 1}):
        yield Problem(f"{key}.adaptive", f"{name} is listed {adaptive.count(name)} times")
    if "alpha" in adaptive and not mixer.retention:
        hint = f"use adaptive: [{', '.join(name for name in adaptive if name != 'alpha')}]"
        yield Problem(f"{key}.adaptive", "holds alpha, but retention is off", hint=hint)
    if mixer.targets == "value" and (adaptive or mixer.query != "static"):
        message = f"value needs adaptive: [] and query: static, they are {list(adaptive)} and {mixer.query}"
        yield Problem(f"{key}.targets", message)
    if (size := mixer.projection_chunk_size) is not None:
        if leaves_rest(size, mixer.chunk_size):
            yield Problem(
                f"{key}.projection_chunk_size", f"{size} is not a multiple of chunk_size = {mixer.chunk_size}"
            )
        if not adaptive and mixer.query == "static":
            message = f"{size} has no effect: no projection is a memory"
            yield Problem(f"{key}.projection_chunk_size", message, hint="leave it null")
    for name in ("chunk_size", "projection_chunk_size"):
        size = getattr(mixer, name)
        if mixer.reset_every is not None and size is not None and leaves_rest(mixer.reset_every, size):
            yield Problem(f"{key}.reset_every", f"{mixer.reset_every} is not a multiple of {name} = {size}")
    if mixer.error_cap is not None and mixer.objective != "l2":
        message = f"{mixer.error_cap:g} has no effect: objective is {mixer.objective}"
        yield Problem(f"{key}.error_cap", message, hint="leave it null, or set objective to l2")


def gate_starts_need_their_gates(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A gate that is switched off has no first value."""
    for name, switch in {"mu_init": "momentum", "alpha_init": "retention"}.items():
        if not getattr(config.model.self_modifying, switch):
            for key in set_keys(config, origins, f"model.self_modifying.{name}"):
                hint = f"leave it out, or turn {switch} on"
                yield Problem(key, f"has no effect: {switch} is off", hint=hint)


def levels(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A block has a level; one per block needs a block for each, of one cost, in one chain, on one stage."""
    model, key, pp = config.model, "model.cms.placement", config.parallel.pp
    own = model.cms.levels
    if not own:
        yield Problem("model.cms.levels", "no level", hint="one level of period 1 is a plain MLP")
    for name, level in own.items():
        if level.phase >= level.update_every_steps:
            message = f"{level.phase} is not below update_every_steps = {level.update_every_steps}"
            yield Problem(f"model.cms.levels.{name}.phase", message)
    if model.cms.placement != "depth":
        return
    widths = sorted({level.d_ff for level in own.values()})
    if len(widths) > 1:
        yield Problem(key, f"depth needs levels of one d_ff, they have {', '.join(map(str, widths))}")
    if 0 < model.num_layers < len(own):
        yield Problem(key, f"depth needs a block for each level: {model.num_layers} blocks, {len(own)} levels")
    if model.cms.variant != "sequential":
        yield Problem("model.cms.variant", f"{model.cms.variant} has no effect: a block has one level")
    if pp is not None and pp > 1:
        yield Problem(key, f"depth needs parallel.pp of 1, it is {pp}: every stage has all levels")


def sources(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A run reads something, and each source is a folder or synthetic, not both and not neither."""
    if not config.data.sources:
        hint = "set data.sources.main.path to a folder written by `hopescale data prepare`"
        yield Problem("data.sources", "no source", hint=hint)
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        if source.path is not None and source.synthetic is not None:
            yield Problem(key, "has both path and synthetic", hint=f"set {key}.path=null or {key}.synthetic=null")
        if source.path is None and source.synthetic is None:
            yield Problem(key, "has neither path nor synthetic", hint=f"set {key}.path, or remove it: {key}=null")
        if source.path == "":
            yield Problem(f"{key}.path", "is empty")
        symbols = 0 if source.synthetic is None else source.synthetic.num_symbols
        if symbols and symbols + SYNTHETIC_MARKERS > config.model.vocab_size:
            needed = f"{symbols} symbols and {SYNTHETIC_MARKERS} markers"
            message = f"{needed} exceed model.vocab_size = {config.model.vocab_size}"
            yield Problem(f"{key}.synthetic.num_symbols", message)


CHECKS: tuple[Check, ...] = (
    heads_divide_the_width,
    only_the_selected_mixer_is_set,
    attention,
    memories,
    gate_starts_need_their_gates,
    levels,
    sources,
)
