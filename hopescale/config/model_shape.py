"""Sizes of a model that follow from its config: widths, heads, memories, levels of a block."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hopescale.config.schema import AttentionConfig, LevelConfig, MixerConfig, ModelConfig, SelfModifyingConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.ops.limits import is_sequential

VOCAB_MULTIPLE = 128
"""The stored vocabulary is padded to a multiple of this, for fast kernels and even tensor-parallel shards."""


def head_dim(model: ModelConfig) -> int:
    """Return the width of a head: as set, or an even share of the model's width."""
    return model.head_dim or model.d_model // model.num_heads


def _one_round(model: ModelConfig) -> tuple[str, ...]:
    return model.pattern or tuple(model.mixers)[:1]


def block_pattern(model: ModelConfig) -> tuple[str, ...]:
    """Return the name of each block's mixer: the pattern, repeated, or the one mixer there is."""
    pattern = _one_round(model)
    return tuple(pattern[number % len(pattern)] for number in range(model.num_layers))


def mixer_of_block(model: ModelConfig, number: int) -> MixerConfig:
    """Return the mixer of a block, counted from 0."""
    pattern = _one_round(model)
    return model.mixers[pattern[number % len(pattern)]]


def mixer_counts(model: ModelConfig) -> list[tuple[MixerConfig, int]]:
    """Return the mixers, and how many blocks have each."""
    pattern, counts = _one_round(model), Counter()
    for place, name in enumerate(pattern):
        counts[name] += (model.num_layers - place + len(pattern) - 1) // len(pattern)
    return [(model.mixers[name], count) for name, count in counts.items() if count > 0]


def self_modifying_mixers(model: ModelConfig) -> dict[str, SelfModifyingConfig]:
    """Return the self-modifying mixers by name."""
    return {name: mixer for name, mixer in model.mixers.items() if isinstance(mixer, SelfModifyingConfig)}


def attention_mixers(model: ModelConfig) -> dict[str, AttentionConfig]:
    """Return the attention mixers by name."""
    return {name: mixer for name, mixer in model.mixers.items() if isinstance(mixer, AttentionConfig)}


def sees_all(mixer: MixerConfig) -> bool:
    """Tell whether a token sees all tokens before it, so that the state grows with the tokens read."""
    if isinstance(mixer, TitansConfig):
        return mixer.window is None and mixer.composition != "mac"
    return isinstance(mixer, AttentionConfig) and mixer.window is None


def kv_heads(model: ModelConfig, mixer: AttentionConfig) -> int:
    """Return the heads of keys and values of attention: as set, or as many as there are of queries."""
    return mixer.num_kv_heads or model.num_heads


def qkv_parts(model: ModelConfig, mixer: AttentionConfig) -> tuple[tuple[int, int], ...]:
    """Return the projections of attention in the rows of each group of heads: how many of a head's width, and that."""
    dim = head_dim(model)
    return (model.num_heads // kv_heads(model, mixer), dim), (1, dim), (1, dim)


def memory_dim(model: ModelConfig, mixer: SelfModifyingConfig) -> int | None:
    """Return the hidden width of a mixer's MLP memories, or None where they are linear."""
    return None if mixer.memory != "mlp" else mixer.memory_dim or head_dim(model)


def normalizes_writes(mixer: SelfModifyingConfig) -> bool:
    """Tell whether writes of a mixer's memories are divided by the factor by which their layers amplify an error."""
    return mixer.memory == "mlp" if mixer.normalize_writes is None else mixer.normalize_writes


def projection_chunk_size(mixer: SelfModifyingConfig) -> int:
    """Return the tokens between two boundaries of the projection memories, or of the only bank."""
    return mixer.projection_chunk_size or mixer.chunk_size


def far_mixer(mixer: SelfModifyingConfig) -> SelfModifyingConfig | None:
    """Return the mixer whose only memory is learned and read like the far one of this mixer; None if it has none."""
    if mixer.far is None:
        return None
    rule = {"adaptive": (), "query": "static", "inner_rule": "gd", "momentum": False, "read": "boundary"}
    pace = {"chunk_size": mixer.far.chunk_size, "projection_chunk_size": None, "reset_every": None, "far": None}
    return replace(mixer, **rule, **pace)


def memory_parts(mixer: MixerConfig) -> list[MixerConfig]:
    """Return the parts of a mixer that go through a sequence by themselves: its memories, and its far one, if any."""
    if not isinstance(mixer, SelfModifyingConfig) or mixer.far is None:
        return [mixer]
    return [replace(mixer, far=None), far_mixer(mixer)]


def num_pieces(mixer: MixerConfig, seq_len: int) -> int:
    """Return the pieces of a sequence between two resets of memories, which do not wait for one another."""
    every = mixer.reset_every if isinstance(mixer, SelfModifyingConfig) else None
    return -(-seq_len // every) if every else 1


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the rows of the embedding: the vocabulary, padded."""
    return -(-model.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def has_chunk_loop(mixer: MixerConfig) -> bool:
    """Tell whether writes depend on the contents of the memories, so that chunks must follow one another."""
    if not isinstance(mixer, SelfModifyingConfig):
        return False
    if mixer.far is not None:
        return True
    adaptive = bool(mixer.adaptive) or mixer.query == "memory"
    inner = {"objective": mixer.objective, "own_target": mixer.targets == "self", "read": mixer.read}
    return is_sequential(adaptive=adaptive, linear=mixer.memory == "linear", **inner)


def memory_banks(mixer: SelfModifyingConfig) -> dict[str, list[str]]:
    """Return the names of the memories in each bank, those that answer with vectors first."""
    others = [name for name in "kv" if name in mixer.adaptive] + ["q"] * (mixer.query == "memory")
    others += [name for name in ("eta", "alpha") if name in mixer.adaptive]
    if mixer.projection_chunk_size in (None, mixer.chunk_size):
        return {"memory": ["mem", *others]}
    return {"memory": ["mem"], "projection": others}


def bank_layers(model: ModelConfig, mixer: SelfModifyingConfig, names: list[str]) -> list[tuple[int, int, int]]:
    """Return inputs, outputs and number of a bank's linear layers: the first, side by side, and the second."""
    gates, dim, hidden = len({"eta", "alpha"} & set(names)), head_dim(model), memory_dim(model, mixer)
    vectors = len(names) - gates
    first = (dim, vectors * (hidden or dim) + gates * (hidden or 1), 1)
    return [first] if hidden is None else [first, (hidden, dim, vectors), (hidden, 1, gates)]


def by_period(levels: dict[str, LevelConfig]) -> list[tuple[str, LevelConfig]]:
    """Sort levels fast to slow; names break ties."""
    return sorted(levels.items(), key=lambda item: (item[1].update_every_steps, item[0]))


def phases(model: ModelConfig, name: str) -> dict[int, int]:
    """Return the phase of a level in each block that has it; with `rolling` they are spread over the period."""
    level = model.cms.levels[name]
    blocks = list(range(model.num_layers))
    if model.cms.placement == "depth":
        blocks = [number for number in blocks if name in levels_of_block(model, number)]
    period = level.update_every_steps
    shifts = [place * period // len(blocks) if level.rolling else 0 for place in range(len(blocks))]
    return {number: (level.phase + shift) % period for number, shift in zip(blocks, shifts, strict=True)}


def levels_of_block(model: ModelConfig, number: int) -> dict[str, LevelConfig]:
    """Return the levels of a block, counted from 0, fast to slow."""
    levels = by_period(model.cms.levels)
    if model.cms.placement == "depth":
        levels = [levels[number * len(levels) // model.num_layers]]
    return dict(levels)
