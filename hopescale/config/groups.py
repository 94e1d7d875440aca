"""Which parameter belongs to which group: by name, every one exactly once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.units import format_count
from hopescale.config.schema import GroupConfig


def assign_groups(
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, GroupConfig],
    tied: Collection[str] = (),
    linear: Collection[str] | None = None,
) -> dict[str, str]:
    """Return the group of every parameter.

    Args:
        shapes: Shapes of the parameters, by name.
        groups: Group settings; the one whose `match` is null takes the parameters that no pattern matches.
        tied: Parameters that several pipeline stages hold.
        linear: Weights of linear layers; None is not known, and not looked at.

    Raises:
        ConfigError: Naming each parameter that two groups claim, or none, or whose group has a rule that cannot update
            it, and each group whose patterns match nothing.
    """
    rest = next((name for name, group in groups.items() if group.match is None), None)
    problems, assigned = [], {}
    for parameter in shapes:
        matching = (name for name, group in groups.items() for one in group.match or () if fnmatchcase(parameter, one))
        claims = list(dict.fromkeys(matching)) or [rest]
        if len(claims) > 1:
            problems.append(Problem("optim.groups", f"parameter {parameter} matches {' and '.join(claims)}"))
        elif claims[0] is None:
            problems.append(Problem("optim.groups", f"parameter {parameter} matches no group"))
        assigned[parameter] = claims[0]
    for name in groups.keys() - assigned.values():
        if (patterns := groups[name].match) is not None:
            problems.append(Problem(f"optim.groups.{name}.match", f"no parameter matches {', '.join(patterns)}"))
    problems += _misfits(assigned, shapes, groups, tied, linear)
    if problems:
        raise ConfigError(problems)
    return assigned


def _misfits(
    assigned: Mapping[str, str | None],
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, GroupConfig],
    tied: Collection[str],
    linear: Collection[str] | None,
) -> Iterator[Problem]:
    """Find the parameters that a rule for matrices cannot update."""
    for parameter, name in assigned.items():
        if name is None or groups[name].rule == "adamw":
            continue
        key, rule, shape = f"optim.groups.{name}.rule", groups[name].rule, list(shapes[parameter])
        hint = "give it to a group with rule: adamw"
        if len(shape) < 2:
            yield Problem(key, f"{rule} updates matrices, but {parameter} has shape {shape}", hint=hint)
        elif parameter in tied:
            yield Problem(key, f"{rule} cannot update {parameter}, which two pipeline stages hold", hint=hint)
        elif rule == "dgd" and linear is not None and parameter not in linear:
            message = f"dgd needs the inputs of a linear layer, but {parameter} is not the weight of one"
            yield Problem(key, message, hint="give it to a group with another rule, such as adamw")


def group_table(assigned: Mapping[str, str], sizes: Mapping[str, int], rates: Mapping[str, float]) -> str:
    """Write the assignment as text, a parameter a line: group, peak learning rate, number of entries, name."""
    width = max(map(len, assigned.values()))
    return "".join(
        f"{group:<{width}}  {rates[group]:.3e}  {sizes[name]:>12,}  {name}\n" for name, group in assigned.items()
    )


def group_summary(assigned: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Write the assignment in a line: each group, how many parameters it has, and how many entries these have."""
    entries: dict[str, list[int]] = {}
    for name, group in assigned.items():
        entries.setdefault(group, []).append(sizes[name])
    return ", ".join(f"{group} {len(own)} ({format_count(sum(own))})" for group, own in entries.items())
