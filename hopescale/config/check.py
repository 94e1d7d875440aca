"""Checks of the values of a config together; all problems are reported at once. Each function checks one thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.config import check_cadence, check_model, check_optim, check_parallel, check_sequence, check_train
from hopescale.config.check_base import Check, Origins
from hopescale.config.fields import numbers
from hopescale.config.layout import Layout
from hopescale.config.load import DEFAULT, LoadedConfig
from hopescale.config.schema import RunConfig

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check(config: RunConfig, origins: Origins | None = None) -> list[Problem]:
    """Return everything wrong with a config, each with the origin of its value; keys without one are defaults."""
    origins = origins or {}
    if config.train.micro_batch_size == "auto":
        # One that is chosen later divides the batch if one of a single sequence does.
        config = replace(config, train=replace(config.train, micro_batch_size=1))
    problems = [problem for each in CHECKS for problem in each(config, origins)]
    set_by = {key: origin for key, origin in origins.items() if origin != DEFAULT}
    return [replace(problem, origin=set_by.get(problem.key)) for problem in problems]


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

    Raises:
        ConfigError: With everything that does not split as the layout says.
    """
    decided = replace(config.parallel, **layout.degrees)
    if problems := check(replace(config, parallel=decided), origins):
        raise ConfigError(problems)


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


CHECKS: tuple[Check, ...] = (
    numbers_in_range,
    name_is_a_folder,
    *check_model.CHECKS,
    *check_cadence.CHECKS,
    *check_train.CHECKS,
    *check_optim.CHECKS,
    *check_parallel.CHECKS,
    *check_sequence.CHECKS,
)
