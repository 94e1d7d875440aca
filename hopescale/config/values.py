"""One value of the config: read by its type from YAML or override text, written as YAML. Knows nothing of keys."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hopescale.common.errors import ConfigError
from hopescale.common.units import parse_count
from hopescale.config.yaml_numbers import refuse_odd_numbers

_UNIONS = (types.UnionType, Union)
_PLAIN_TEXT = re.compile(r"[A-Za-z_][\w./-]*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def split_optional(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into `X` and whether None is allowed; `X` may be a union itself."""
    if get_origin(hint) not in _UNIONS:
        return hint, False
    inner = [arg for arg in get_args(hint) if arg is not types.NoneType]
    return Union[tuple(inner)], len(inner) < len(get_args(hint))  # noqa: UP007 (of a tuple)


def describe_type(hint: Any) -> str:
    """Name a type as a recipe's author sees it: `int or null`, `one of mlp, linear`, `[float, float]`."""
    inner, optional = split_optional(hint)
    if optional:
        return f"{describe_type(inner)} or null"
    if get_origin(inner) in _UNIONS:
        return " or ".join(arg if isinstance(arg, str) else describe_type(arg) for arg in _choices(inner))
    if inner is Any:
        return "any value"
    if is_dataclass(inner):
        return "a section"
    origin, args = get_origin(inner), get_args(inner)
    if origin is dict:
        return "entries by name"
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin is tuple:
        return f"[{', '.join('...' if arg is Ellipsis else describe_type(arg) for arg in args)}]"
    return inner.__name__


def _choices(union: Any) -> tuple[Any, ...]:
    """Return the type in a union with words, `int | Literal["auto"]`, and the words."""
    kind, words = get_args(union)
    return kind, *get_args(words)


def read_value(value: Any, hint: Any) -> Any:
    """Read a value that YAML produced as the type `hint`; counts may carry units (`64Ki`).

    Raises:
        ConfigError: If the value does not fit the type.
    """
    inner, optional = split_optional(hint)
    if value is None and optional:
        return None
    if get_origin(inner) is tuple:
        return _read_tuple(value, inner, hint)
    if get_origin(inner) in _UNIONS:
        kind, *words = _choices(inner)
        return value if isinstance(value, str) and value in words else read_value(value, kind)
    if get_origin(inner) is Literal:
        if value in get_args(inner) and isinstance(value, str):
            return value
        raise _misfit(value, hint)
    return _SCALARS[inner](value, hint)


def read_text(text: str, hint: Any) -> Any:
    """Read the text of an override as the type `hint`: text verbatim, numbers with units, lists as YAML.

    Raises:
        ConfigError: If the text does not denote a value of the type.
    """
    inner, optional = split_optional(hint)
    if optional and text == "null":
        return None
    if inner is bool:
        return read_value({"true": True, "false": False}.get(text.lower(), text), hint)
    if get_origin(inner) is tuple:
        return read_value(parse_yaml(text), hint)
    return read_value(text, hint)


def parse_yaml(text: str) -> Any:
    """Parse the YAML of an override's value.

    Raises:
        ConfigError: If the text is not YAML.
    """
    try:
        refuse_odd_numbers(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (YAMLError, OmegaConfBaseException):
        raise ConfigError(f"cannot read {text!r} as YAML", "quote texts inside a list: '[\"*.bias\"]'") from None


def format_value(value: Any) -> str:
    """Write a value as YAML on one line; reading it back gives the same value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_value(name)}: {format_value(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, str) and not (_PLAIN_TEXT.fullmatch(value) and value.lower() not in _YAML_WORDS):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _misfit(value: Any, hint: Any, advice: str | None = None) -> ConfigError:
    return ConfigError(f"expected {describe_type(hint)}, got {format_value(value)}", advice)


def _read_tuple(value: Any, inner: Any, hint: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _misfit(value, hint, "write a list: [a, b]")
    items = get_args(inner)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise _misfit(value, hint)
    return tuple(read_value(item, item_hint) for item, item_hint in zip(value, items, strict=True))


def _read_bool(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _misfit(value, hint, "write true or false")


def _read_int(value: Any, hint: Any) -> int:
    if isinstance(value, str):
        try:
            return parse_count(value)
        except (ValueError, OverflowError):
            raise _misfit(value, hint, "counts look like 4096, 32k, 1.5M or 64Ki") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise _misfit(value, hint)
    return int(value)


def _read_float(value: Any, hint: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise _misfit(value, hint)
    return number


def _read_str(value: Any, hint: Any) -> str:
    if not isinstance(value, str):
        scalar = value is not None and not isinstance(value, dict | list)
        raise _misfit(value, hint, f'quote it: "{format_value(value)}"' if scalar else None)
    return _read_any(value, hint)


def _read_any(value: Any, _: Any) -> Any:
    if "${" in str(value):
        raise ConfigError(f"{value!r} holds an interpolation, which recipes do not have", "write the value itself")
    return value


_SCALARS: dict[Any, Callable[[Any, Any], Any]] = {
    Any: _read_any,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
}
