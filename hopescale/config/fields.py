"""The schema as a tree of dotted keys: types, defaults, docstrings, leaves. Knows nothing of files."""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hopescale.config.schema import KINDS, MixerConfig, RunConfig
from hopescale.config.schema.ranges import NumberRange
from hopescale.config.values import describe_type, format_value, split_optional

ENTRY = "NAME"
"""Stands for the name of an entry in the dotted keys of `field_docs`."""


@dataclass(frozen=True)
class FieldDoc:
    """One row of the reference: dotted key, type and default as a recipe's author sees them, docstring.

    The key of a mixer has the kind of mixers that have it.
    """

    key: str
    type: str
    default: str
    doc: str
    kind: str = ""


@cache
def child_types(section: Any) -> Mapping[str, Any] | None:
    """Return the types of a section's fields by name, of a mixer those of all kinds; None where it is no dataclass."""
    if section is MixerConfig:
        hints = [get_type_hints(kind) for kind in (*KINDS.values(), section)]
        return {name: hint for kind in hints for name, hint in kind.items()}
    return get_type_hints(section) if is_dataclass(section) else None


def entry_type(hint: Any) -> Any | None:
    """Return the type of the entries of a `dict[str, X]`, or None for any other type."""
    return get_args(hint)[1] if get_origin(hint) is dict else None


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """List the values of a config, or of a nested dict, by dotted key. Lists are one value."""
    found: dict[str, Any] = {}
    for name, value in children(node):
        if is_dataclass(value) or isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def numbers(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, NumberRange]]:
    """List the fields of a config that have a range and a value: dotted key, value, range."""
    hints = {} if isinstance(node, dict) else get_type_hints(type(node), include_extras=True)
    for name, value in children(node):
        if is_dataclass(value) or isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif value is not None and not isinstance(value, str) and (interval := interval_of(hints[name])):
            yield f"{prefix}{name}", value, interval


def interval_of(hint: Any) -> NumberRange | None:
    """Return the range that a field's type says, or None for a type without one."""
    inner = split_optional(hint)[0]
    inner = next(iter(get_args(inner))) if get_origin(inner) in (types.UnionType, Union) else inner
    return next(iter(getattr(inner, "__metadata__", ())), None)


def map_entries(node: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Return a copy of a config with `change` applied to every dict of named entries in it."""
    changed: dict[str, Any] = {}
    for name, value in children(node):
        if isinstance(value, dict):
            changed[name] = {key: map_entries(entry, change) for key, entry in change(value).items()}
        elif is_dataclass(value):
            changed[name] = map_entries(value, change)
    return replace(node, **changed)


def field_docs(section: type = RunConfig, prefix: str = "", kind: str = "") -> Iterator[FieldDoc]:
    """List every field of the schema, in the order of its definition; `NAME` stands for an entry's name."""
    docs, defaults = docstrings(section), section()
    for name, hint in get_type_hints(section).items():
        key, default = f"{prefix}{name}", getattr(defaults, name)
        inner, _ = split_optional(hint)
        if not is_dataclass(inner) or default is None:
            shown = f"entries {', '.join(default)}" if default and isinstance(default, dict) else format_value(default)
            yield FieldDoc(key, describe_type(hint), shown, docs[name], kind)
        entry = split_optional(entry_type(inner))[0]
        if is_dataclass(inner):
            yield from field_docs(inner, f"{key}.", kind)
        elif entry is MixerConfig:
            for each, mixer in KINDS.items():
                yield from field_docs(mixer, f"{key}.{ENTRY}.", each)
        elif is_dataclass(entry):
            yield from field_docs(entry, f"{key}.{ENTRY}.")


def docstrings(section: type) -> dict[str, str]:
    """Read the strings beneath a dataclass's fields from its source, on one line each; of inherited fields, too."""
    found = docstrings(section.__base__) if is_dataclass(section.__base__) else {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    for field_node, doc_node in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field_node, ast.AnnAssign) and isinstance(doc_node, ast.Expr):
            assert isinstance(field_node.target, ast.Name)
            found[field_node.target.id] = " ".join(ast.literal_eval(doc_node.value).split())
    return found


def suggest(prefix: str, name: str, rest: str, known: list[str], schema: type = RunConfig) -> str:
    """Suggest the key that an unknown one may stand for.

    Args:
        prefix: The known part of the dotted key, empty or with a final dot.
        name: The first unknown name.
        rest: Rest of the key after that name, empty or with a first dot.
        known: The names allowed in place of `name`.
        schema: Type of the whole file.
    """
    if "." in name:
        return "nest the keys in a file; dotted keys are for the command line"
    key, every = f"{prefix}{name}{rest}", list(dict.fromkeys(row.key for row in field_docs(schema)))
    same_name = [other for other in every if other.rpartition(".")[2] == key.rpartition(".")[2]]
    # A key of that very name elsewhere is meant rather than one here that is only somewhat like it.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if same_name else 0.6)
    if close:
        return f"did you mean {prefix}{close[0]}{rest}?"
    similar = same_name or difflib.get_close_matches(key, every, n=1, cutoff=0.75)
    return f"did you mean {' or '.join(similar[:3])}?" if similar else f"known here: {', '.join(known)}"


def children(node: Any) -> list[tuple[str, Any]]:
    """List the members of a section or of a dict of entries, by name."""
    if isinstance(node, dict):
        return list(node.items())
    return [(field.name, getattr(node, field.name)) for field in fields(node)]
