"""Which parameter belongs to which group: by name, every one exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schema import GroupConfig


def assign_groups(names: Iterable[str], groups: Mapping[str, GroupConfig]) -> dict[str, str]:
    """Return the group of every parameter.

    Args:
        names: Parameter names.
        groups: Group settings; the one whose `match` is null takes what no pattern matches.

    Raises:
        ConfigError: Naming each parameter that two groups claim, or none, and each group whose patterns match nothing.
    """
    names = list(names)
    rest = next((name for name, group in groups.items() if group.match is None), None)
    problems, assigned = [], {}
    for parameter in names:
        claims = [name for name, group in groups.items() if _matches(parameter, group)] or [rest]
        if len(claims) > 1:
            problems.append(Problem("optim.groups", f"parameter {parameter} matches {' and '.join(claims)}"))
        elif claims[0] is None:
            problems.append(Problem("optim.groups", f"parameter {parameter} matches no group"))
        assigned[parameter] = claims[0]
    for name in groups.keys() - assigned.values():
        if groups[name].match is not None:
            problems.append(
                Problem(f"optim.groups.{name}.match", f"no parameter matches {', '.join(groups[name].match)}")
            )
    if problems:
        raise ConfigError(problems)
    return assigned


def _matches(parameter: str, group: GroupConfig) -> bool:
    return any(fnmatchcase(parameter, pattern) for pattern in group.match or ())


def group_table(assigned: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Write the assignment as text, a parameter a line: group, number of entries, name."""
    width = max(map(len, assigned.values()))
    return "\n".join(f"{group:<{width}}  {sizes[name]:>12,}  {name}" for name, group in assigned.items()) + "\n"
