"""Checks of `model` and `data`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest
from hopescale.config.linear_attention import linear_attention_problems
from hopescale.config.model_shape import attention_mixers, head_dim, kv_heads, self_modifying_mixers
from hopescale.config.schema import (
    FarMemoryConfig,
    LinearAttentionConfig,
    RopeScalingConfig,
    RunConfig,
    SelfModifyingConfig,
    TitansConfig,
    TttConfig,
)
from hopescale.config.titans import titans_problems
from hopescale.config.ttt import ttt_problems

SYNTHETIC_MARKERS = 2
"""Symbols of the vocabulary that a synthetic task needs beside its own."""


def heads_divide_the_width(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Heads without a width of their own share the model's evenly."""
    model = config.model
    if model.head_dim is None and leaves_rest(model.d_model, model.num_heads):
        message = f"{model.d_model} is not a multiple of num_heads = {model.num_heads}"
        yield Problem("model.d_model", message, hint="change either, or set model.head_dim")


def blocks_have_mixers(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Each block has a mixer that is defined, and each mixer is in a block."""
    model, names = config.model, ", ".join(config.model.mixers)
    if not model.mixers:
        hint = "set model.mixers.NAME.kind, or begin with a base: base/hope.yaml or base/transformer.yaml"
        yield Problem("model.mixers", "no mixer", hint=hint)
    elif not model.pattern and len(model.mixers) > 1:
        message = f"is empty, and there are {len(model.mixers)} mixers: {names}"
        yield Problem("model.pattern", message, hint=f"name them in the order of the blocks: [{names}]")
    for name in sorted(set(model.pattern) - set(model.mixers)):
        hint = f"define model.mixers.{name}, or name one of {names}" if names else ""
        yield Problem("model.pattern", f"holds {name}, which is no mixer of the model", hint=hint)
    if 0 < model.num_layers < len(model.pattern):
        message = f"names {len(model.pattern)} blocks, but model.num_layers is {model.num_layers}"
        yield Problem("model.pattern", message, hint="leave out what no block has")
    for name in model.mixers if model.pattern else ():
        if name not in model.pattern:
            yield Problem(
                f"model.mixers.{name}", "has no effect: model.pattern does not name it", hint="set it to null"
            )


def attention(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Rotary positions turn pairs of channels, and each head of keys serves equally many heads of queries."""
    model = config.model
    for name, mixer in attention_mixers(model).items():
        key, scaling = f"model.mixers.{name}", mixer.rope_scaling
        if model.num_heads > 0 and head_dim(model) % 2:
            yield Problem("model.head_dim", f"attention needs an even head dim, it is {head_dim(model)}")
        if leaves_rest(model.num_heads, kv_heads(model, mixer)):
            message = f"{mixer.num_kv_heads} does not divide model.num_heads = {model.num_heads}"
            yield Problem(f"{key}.num_kv_heads", message)
        if scaling is not None and scaling.kind == "linear":
            for part in ("low_freq_factor", "high_freq_factor", "first_context"):
                if getattr(scaling, part) != getattr(RopeScalingConfig(), part):
                    yield Problem(f"{key}.rope_scaling.{part}", "has no effect: kind is linear", hint="leave it out")
        elif scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
            message = f"{scaling.high_freq_factor:g} is not above low_freq_factor = {scaling.low_freq_factor:g}"
            yield Problem(f"{key}.rope_scaling.high_freq_factor", message)


def memories(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Each projection is a memory or a static map, and each memory has the settings that it needs."""
    for name, mixer in self_modifying_mixers(config.model).items():
        for problem in _memories(mixer):
            yield replace(problem, key=f"model.mixers.{name}.{problem.key}")


def _memories(mixer: SelfModifyingConfig) -> Iterator[Problem]:
    adaptive, size = mixer.adaptive, mixer.projection_chunk_size
    if mixer.memory_dim is not None and mixer.memory != "mlp":
        message = f"{mixer.memory_dim} has no effect: memory is {mixer.memory}"
        yield Problem("memory_dim", message, hint="leave it null, or set memory to mlp")
    for name in sorted({name for name in adaptive if adaptive.count(name) > 1}):
        yield Problem("adaptive", f"{name} is listed {adaptive.count(name)} times")
    if "alpha" in adaptive and not mixer.retention:
        hint = f"use adaptive: [{', '.join(name for name in adaptive if name != 'alpha')}]"
        yield Problem("adaptive", "holds alpha, but retention is off", hint=hint)
    if mixer.targets == "value" and (adaptive or mixer.query != "static"):
        message = f"value needs adaptive: [] and query: static, they are {list(adaptive)} and {mixer.query}"
        yield Problem("targets", message)
    if size is not None and leaves_rest(size, mixer.chunk_size):
        yield Problem("projection_chunk_size", f"{size} is not a multiple of chunk_size = {mixer.chunk_size}")
    if size is not None and not adaptive and mixer.query == "static":
        message = f"{size} has no effect: no projection is a memory"
        yield Problem("projection_chunk_size", message, hint="leave it null")
    for name in ("chunk_size", "projection_chunk_size"):
        tokens = getattr(mixer, name)
        if mixer.reset_every is not None and tokens is not None and leaves_rest(mixer.reset_every, tokens):
            yield Problem("reset_every", f"{mixer.reset_every} is not a multiple of {name} = {tokens}")
    yield from _far_memory(mixer)
    if mixer.error_cap is not None and mixer.objective != "l2":
        message = f"{mixer.error_cap:g} has no effect: objective is {mixer.objective}"
        yield Problem("error_cap", message, hint="leave it null, or set objective to l2")
    if mixer.normalize_writes and mixer.memory == "linear":
        hint = "leave it out: keys of linear memories have length 1"
        yield Problem("normalize_writes", "true has no effect: memory is linear", hint=hint)
    switches = {"mu_init": "momentum", "momentum_write": "momentum", "alpha_init": "retention"}
    for name, switch in switches.items():
        if not getattr(mixer, switch) and getattr(mixer, name) != getattr(type(mixer)(), name):
            hint = f"leave it out, or turn {switch} on"
            yield Problem(name, f"has no effect: {switch} is off", hint=hint)


def _far_memory(mixer: SelfModifyingConfig) -> Iterator[Problem]:
    if mixer.far is None:
        return
    if leaves_rest(mixer.far.chunk_size, mixer.chunk_size):
        message = f"{mixer.far.chunk_size} is not a multiple of the mixer's chunk_size = {mixer.chunk_size}"
        yield Problem("far.chunk_size", message)
    if not mixer.retention and mixer.far.alpha_init != FarMemoryConfig().alpha_init:
        yield Problem("far.alpha_init", "has no effect: retention is off", hint="leave it out, or turn retention on")


def far_memories_are_read(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A far memory is read one chunk after it was written: a sequence has more than one of its chunks."""
    tokens = config.train.seq_len
    for name, mixer in self_modifying_mixers(config.model).items():
        if mixer.far is not None and mixer.far.chunk_size >= tokens > 0:
            message = f"{mixer.far.chunk_size} is not below train.seq_len = {tokens}: what it writes is never read"
            yield Problem(f"model.mixers.{name}.far.chunk_size", message, hint="make it smaller, or leave far null")


def linear_attention(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Switches of a mixer with linear memories go together."""
    for name, mixer in config.model.mixers.items():
        if isinstance(mixer, LinearAttentionConfig) and config.model.num_heads > 0:
            yield from linear_attention_problems(config.model, mixer, f"model.mixers.{name}", config.parallel.tp)


def test_time_training(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Memories of TTT have the settings that they need."""
    for name, mixer in config.model.mixers.items():
        if isinstance(mixer, TttConfig) and config.model.num_heads > 0:
            yield from ttt_problems(config.model, mixer, f"model.mixers.{name}")


def titans(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A memory, attention and persistent tokens go together."""
    for name, mixer in config.model.mixers.items():
        if isinstance(mixer, TitansConfig) and config.model.num_heads > 0:
            yield from titans_problems(config.model, mixer, f"model.mixers.{name}")


def memories_grow_alike(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """With `model.transfer` all hidden widths of memories grow with the head dim, or none does."""
    mixers = {name: mixer for name, mixer in self_modifying_mixers(config.model).items() if mixer.memory == "mlp"}
    fixed = [name for name, mixer in mixers.items() if mixer.memory_dim is not None]
    if config.model.transfer is not None and fixed and len(fixed) < len(mixers):
        others = ", ".join(name for name in mixers if name not in fixed)
        message = f"is set, and that of {others} is null: with model.transfer all must be set, or none"
        yield Problem(f"model.mixers.{fixed[0]}.memory_dim", message)


def documents_matter(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Rows of a generated source are one document each: nothing is to be kept apart."""
    sources = config.data.sources.values()
    if config.model.within_documents and sources and all(source.path is None for source in sources):
        message = "true has no effect: each row of a synthetic source or a suite is one document"
        yield Problem("model.within_documents", message, hint="leave it false")


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
    """A run reads something, and each source is a folder, synthetic or a suite's task, and one of them."""
    if not config.data.sources:
        hint = "set data.sources.main.path to a folder written by `hopescale data prepare`"
        yield Problem("data.sources", "no source", hint=hint)
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        parts = {"path": source.path, "synthetic": source.synthetic, "suite": source.suite}
        having = [part for part, value in parts.items() if value is not None]
        if len(having) > 1:
            hint = " or ".join(f"set {key}.{part}=null" for part in having)
            yield Problem(key, f"has both {' and '.join(having)}", hint=hint)
        if not having:
            message = "has neither path, nor synthetic, nor suite"
            yield Problem(key, message, hint=f"set {key}.path, or remove it: {key}=null")
        if source.path == "":
            yield Problem(f"{key}.path", "is empty")
        symbols = 0 if source.synthetic is None else source.synthetic.num_symbols
        if symbols and symbols + SYNTHETIC_MARKERS > config.model.vocab_size:
            needed = f"{symbols} symbols and {SYNTHETIC_MARKERS} markers"
            message = f"{needed} exceed model.vocab_size = {config.model.vocab_size}"
            yield Problem(f"{key}.synthetic.num_symbols", message)


CHECKS: tuple[Check, ...] = (
    heads_divide_the_width,
    blocks_have_mixers,
    attention,
    memories,
    far_memories_are_read,
    linear_attention,
    test_time_training,
    titans,
    memories_grow_alike,
    documents_matter,
    levels,
    sources,
)
