"""The type of a check of a config's values, and helpers that checks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hopescale.common.errors import Problem
from hopescale.config.fields import leaves
from hopescale.config.load import DEFAULT
from hopescale.config.schema import RunConfig

Origins = Mapping[str, str]
"""Where each key was set, as loading returns it."""

Check = Callable[[RunConfig, Origins], Iterator[Problem]]
"""Yields what is wrong with a config. Numbers out of range are `numbers_in_range`'s to report, not a crash."""


def set_keys(config: RunConfig, origins: Origins, prefix: str) -> list[str]:
    """List the keys below `prefix`, or that key itself, that a file or an override has set to other than the default.

    A key set to its default changes nothing, and the resolved config of a run sets every key.
    """
    values, defaults = leaves(config), leaves(RunConfig())
    return [
        key
        for key, origin in origins.items()
        if origin != DEFAULT
        and (key == prefix or key.startswith(f"{prefix}."))
        and (key not in defaults or values.get(key) != defaults[key])
    ]


def leaves_rest(value: int, unit: int) -> bool:
    """Tell whether `value` is not a multiple of `unit`; never, of a unit out of range."""
    return unit > 0 and value % unit != 0
