"""A recipe and its overrides become one frozen config; every problem of every file is reported at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.paths import display_path
from hopescale.config.fields import child_types, entry_type, leaves, map_entries, suggest
from hopescale.config.files import find_recipe, read_chain, read_yaml
from hopescale.config.mixers import begin_anew, misplaced, read_old, read_resolved
from hopescale.config.schema import RunConfig
from hopescale.config.values import (
    describe_type,
    format_value,
    parse_yaml,
    read_text,
    read_value,
    split_optional,
)

DEFAULT = "default"
COMMAND_LINE = "command line"

T = TypeVar("T")

_ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class LoadedConfig:
    """A config and where it came from: a recipe's file, and all files read, bases first."""

    config: RunConfig
    origins: dict[str, str]
    """Origin of every dotted key: the file that set it last, `command line` or `default`."""
    recipe: Path
    files: list[Path]


@dataclass(frozen=True)
class _ConfigLayer:
    origin: str
    tree: dict[str, Any]


class _Text(str):
    """The value of an override: text that its key's type will read."""


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Resolve defaults, bases, recipe and `key=value` overrides, later ones winning.

    Types are checked here; what the values mean together is checked by `hopescale.config.check`.

    Args:
        recipe: A path, or the name of a shipped recipe.
        overrides: `dotted.key=value` texts; `null` as a value removes a named entry.

    Raises:
        ConfigError: With every unknown key and every misfit of all files and overrides.
    """
    problems: list[Problem] = []
    chain = []
    try:
        chain = read_chain(find_recipe(recipe))
    except ConfigError as error:
        problems += error.problems
    layers = [_read_layer(read_old(tree), display_path(file), problems) for file, tree in chain]
    layers += [_read_override(text, problems) for text in overrides]
    config = _merge(RunConfig(), layers, problems)
    files = [file for file, _ in chain]
    return LoadedConfig(config, _origins(layers, config), files[-1], files)


def load_settings(path: Path, schema: type[T]) -> T:
    """Read a YAML file that is no recipe as a dataclass with defaults, by the rules of recipes; it has no `base`.

    Entries of a dict that are sections have names; other dicts may hold any key.

    Raises:
        ConfigError: If the file cannot be read; with every unknown key and every misfit.
    """
    problems: list[Problem] = []
    layer = _read_layer(read_yaml(path), display_path(path), problems, schema)
    if problems:
        raise ConfigError(problems)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), layer.tree))


def load_resolved(path: str | Path) -> RunConfig:
    """Read the `config.yaml` of a run folder, as written by `to_yaml`, as `from_dict` does.

    Raises:
        ConfigError: If the file is missing, is not YAML, or does not fit the schema.
    """
    return from_dict(read_yaml(Path(path)), display_path(Path(path)))


def from_dict(tree: dict[str, Any], origin: str) -> RunConfig:
    """Read a resolved config from plain values, as `to_dict` gives them.

    Named entries are the tree's alone: none comes from the defaults. Values of earlier versions are read as they are
    written now.

    Raises:
        ConfigError: If the tree does not fit the schema.
    """
    problems: list[Problem] = []
    layer = _read_layer(read_resolved(tree), origin, problems)
    return _merge(map_entries(RunConfig(), lambda entries: {}), [layer], problems)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return every value of a config as plain dicts, lists, text and numbers."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def to_yaml(config: RunConfig) -> str:
    """Write a config with every value, to be read back by `load_resolved`, or as a recipe.

    Entries of the defaults that the config lacks are null: a recipe would have them otherwise.
    """
    groups = {**dict.fromkeys(RunConfig().optim.groups), **config.optim.groups}
    return OmegaConf.to_yaml(OmegaConf.structured(replace(config, optim=replace(config.optim, groups=groups))))


def _read_layer(tree: Any, origin: str, problems: list[Problem], schema: type = RunConfig) -> _ConfigLayer:
    return _ConfigLayer(origin, _read_section(tree, schema, "", origin, problems, schema))


def _read_override(text: str, problems: list[Problem]) -> _ConfigLayer:
    key, equals, value = text.partition("=")
    if not equals:
        problems.append(Problem(text, "not an override", COMMAND_LINE, "write key=value, with a dotted key"))
        return _ConfigLayer(COMMAND_LINE, {})
    tree: Any = _Text(value)
    for name in reversed(key.strip().split(".")):
        tree = {name: tree}
    return _read_layer(tree, COMMAND_LINE, problems)


def _read_section(
    tree: Any, section: Any, prefix: str, origin: str, problems: list[Problem], schema: type
) -> dict[str, Any]:
    """Read the children of a section or of a dict of entries; report and leave out those that do not fit."""
    known, entry = child_types(section), entry_type(section)
    result = {}
    for name, value in tree.items():
        if known is not None and name not in known:
            problems.append(_unknown_key(prefix, str(name), value, list(known), origin, schema))
            continue
        key = f"{prefix}{name}"
        try:
            if is_dataclass(split_optional(entry)[0]) and not (isinstance(name, str) and _ENTRY_NAME.fullmatch(name)):
                raise ConfigError("not a name for an entry", "use letters, digits, _ and -, in quotes if all digits")
            result[name] = _read_node(value, entry if known is None else known[name], key, origin, problems, schema)
        except ConfigError as error:
            problems.append(Problem(key, error.message, origin, error.hint))
    return result


def _read_node(value: Any, hint: Any, key: str, origin: str, problems: list[Problem], schema: type) -> Any:
    inner, optional = split_optional(hint)
    if child_types(inner) is None and entry_type(inner) is None:
        return read_text(str(value), hint) if isinstance(value, _Text) else read_value(value, hint)
    if isinstance(value, _Text):
        value = parse_yaml(value)
    if value is None and optional:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"expected {describe_type(hint)}, got {format_value(value)}", f"set {key}.<key>")
    return _read_section(value, inner, f"{key}.", origin, problems, schema)


def _unknown_key(prefix: str, name: str, value: Any, known: list[str], origin: str, schema: type) -> Problem:
    rest = ""
    while isinstance(value, dict) and len(value) == 1:  # as long as the key was written
        ((inner, value),) = value.items()
        rest += f".{inner}"
    return Problem(f"{prefix}{name}{rest}", "unknown key", origin, suggest(prefix, name, rest, known, schema))


def _merge(start: RunConfig, layers: list[_ConfigLayer], problems: list[Problem]) -> RunConfig:
    mixers = begin_anew([layer.tree for layer in layers])
    problems += [problem for layer in layers for problem in misplaced(layer.tree, mixers, layer.origin)]
    if problems:
        raise ConfigError(problems)
    if any("mixers" in layer.tree.get("model", {}) for layer in layers):
        start = replace(start, model=replace(start.model, mixers=mixers))
    merged = OmegaConf.merge(OmegaConf.structured(start), *(layer.tree for layer in layers))
    config = OmegaConf.to_object(merged)
    return map_entries(config, lambda entries: {name: entry for name, entry in entries.items() if entry is not None})


def _origins(layers: list[_ConfigLayer], config: RunConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for layer in layers:
        for key, value in leaves(layer.tree).items():
            if value is None:
                found = {other: origin for other, origin in found.items() if not other.startswith(f"{key}.")}
            found[key] = layer.origin
    return {key: found.get(key, DEFAULT) for key in leaves(config)}
