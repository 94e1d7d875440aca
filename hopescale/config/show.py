"""Configs for people: with origins, as a difference, and the keys that a resumed run may not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from hopescale.common.errors import Problem
from hopescale.config.fields import children, leaves
from hopescale.config.load import DEFAULT
from hopescale.config.model_shape import by_period, memory_banks, normalizes_writes, self_modifying_mixers
from hopescale.config.schema import RunConfig
from hopescale.config.values import format_value

IDENTITY: tuple[str, ...] = (
    "model",  # the checkpoint's weights and memories fit this model alone
    "data.seed",  # fixes the order of the samples: with another one, some come twice and some never
    "data.sources",  # the same, and the validation losses would be of other text; where it lies is free
    "train.seq_len",  # cuts the text into samples: their order continues only at the same cut
    "train.global_batch_tokens",  # tokens seen = steps * batch: the place in the data and every curve rest on it
    "train.seed",  # the weights in the checkpoint were drawn with it
)
"""Keys, or sections, that a run keeps for life."""
FREE = ("update_every_steps", "update_every_tokens", "phase", "rolling", "lag", "wire", "init_std")
"""Last parts of the keys of a model that do not change what it computes."""

PACE = ("chunk_size", "projection_chunk_size", "reset_every")
"""Last parts of the keys of a mixer that say when its memories are at a boundary or start anew. They change what a
model computes, not its weights: a run may begin with weights of another pace. `ttt` learns a rate for each place of a
chunk, so its `chunk_size` stays."""


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()
"""Stands in a difference for a key that one of the two configs lacks."""

Change = tuple[str, Any, Any]


def show(config: RunConfig, origins: Mapping[str, str]) -> str:
    """Write a config as YAML, with the origin of each value that is not a default as a comment."""
    return "\n".join(_lines(config, origins, "", 0)) + "\n"


def diff(a: RunConfig, b: RunConfig) -> list[Change]:
    """List the keys at which two configs differ, with both values; `ABSENT` where one has no such key."""
    old, new = leaves(a), leaves(b)
    pairs = [(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**old, **new}]
    return [(key, before, after) for key, before, after in pairs if before != after]


def meant_diff(a: RunConfig, b: RunConfig) -> list[Change]:
    """List the keys at which two configs differ in meaning; a null is compared by the value that it stands for.

    Runs of an earlier version hold `normalize_writes: false` where null now means the same.
    """
    return diff(_meant(a), _meant(b))


def _meant(config: RunConfig) -> RunConfig:
    memories = self_modifying_mixers(config.model).items()
    said = {name: replace(mixer, normalize_writes=normalizes_writes(mixer)) for name, mixer in memories}
    return replace(config, model=replace(config.model, mixers={**config.model.mixers, **said}))


def config_facts(config: RunConfig) -> dict[str, str]:
    """Return the values of a config as text by dotted key, for ranks to compare."""
    return {key: format_value(value) for key, value in leaves(config).items()}


def format_diff(changes: list[Change]) -> str:
    """Write a difference, one key a line: `train.steps: 100 -> 200`."""
    return "\n".join(f"{key}: {_format(before)} -> {_format(after)}" for key, before, after in changes)


def identity_problems(old: RunConfig, new: RunConfig) -> list[Problem]:
    """List the changes that a resumed run cannot take: those below `IDENTITY`. All others are its user's choice.

    Data may lie elsewhere: the fingerprint of its content, which a checkpoint keeps, decides whether it is the same.
    """
    hint = "set it back, or start a new run in another --run-dir"
    return [
        Problem(key, f"is {_format(before)} in the run folder, now {_format(after)}: a run cannot change it", hint=hint)
        for key, before, after in meant_diff(old, new)
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in IDENTITY)
        and not is_other_place((key, before, after))
    ]


def is_other_place(change: Change) -> bool:
    """Tell whether a change names another folder for a data set, or the same one in another way."""
    key, before, after = change
    is_path = key.startswith("data.sources.") and key.endswith(".path")
    return is_path and isinstance(before, str) and isinstance(after, str)


def model_problems(old: RunConfig, new: RunConfig, origin: str, *, weights_alone: bool = False) -> list[Problem]:
    """List the keys at which a model is not the one whose weights were saved, but for `FREE`; levels keep their order.

    Args:
        old: Config that was saved with the weights.
        new: Config of the model that takes them.
        origin: Place of the old config.
        weights_alone: Whether nothing that memories hold is taken, so that `PACE` may change as well.
    """

    def is_free(key: str) -> bool:
        parts = key.split(".")
        mixer = new.model.mixers.get(parts[2]) if parts[1] == "mixers" else None
        is_pace = weights_alone and mixer is not None and mixer.kind != "ttt" and parts[-1] in PACE
        return parts[-1] in FREE or is_pace

    problems = [
        Problem(key, f"is {_format(after)}, but {_format(before)} in {origin}", hint="set it as it is there")
        for key, before, after in meant_diff(old, new)
        if key.startswith("model.") and not is_free(key)
    ]
    both = self_modifying_mixers(old.model).keys() & self_modifying_mixers(new.model).keys() if not problems else ()
    for name in sorted(both):
        before, after = (len(memory_banks(config.model.mixers[name])) for config in (old, new))
        if before != after:
            key = f"model.mixers.{name}.projection_chunk_size"
            message = f"puts memories into {after} bank{'s' * (after > 1)}, but they are in {before} in {origin}"
            hint = "make it equal to chunk_size where it is equal there, and larger where it is larger"
            problems.append(Problem(key, message, hint=hint))
    before, after = (", ".join(name for name, _ in by_period(config.model.cms.levels)) for config in (old, new))
    if not problems and before != after:
        message = f"are {after} from fast to slow, but {before} in {origin}: their order changes what they compute"
        problems.append(Problem("model.cms.levels", message, hint="choose periods that keep the order"))
    return problems


def _format(value: Any) -> str:
    return repr(value) if value is ABSENT else format_value(value)


def _lines(node: Any, origins: Mapping[str, str], prefix: str, depth: int) -> list[str]:
    lines = []
    for name, value in children(node):
        key, indent = f"{prefix}{name}", "  " * depth
        if is_dataclass(value) or (isinstance(value, dict) and value):
            lines += [f"{indent}{format_value(name)}:", *_lines(value, origins, f"{key}.", depth + 1)]
        else:
            origin = origins.get(key, DEFAULT)
            comment = "" if origin == DEFAULT else f"  # {origin}"
            lines.append(f"{indent}{format_value(name)}: {format_value(value)}{comment}")
    return lines
