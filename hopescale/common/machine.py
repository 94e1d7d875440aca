"""Memory of the machine that a process may fill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""File of a control group with its limit, by the controllers that `/proc/self/cgroup` names: none is version 2."""


def machine_memory(root: Path = _ROOT) -> int:
    """Return the bytes of memory that the processes of this machine, or of this one's control group, may fill.

    Args:
        root: Folder that holds `proc` and `sys`, where Linux tells the limits of control groups.
    """
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """List the limits of this process's control groups and of those that they lie in.

    A container may see its own group as the top one, wherever the list says that it lies.
    """
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        for controller in controllers.split(","):
            if controller not in _LIMITS:
                continue
            top = root / "sys" / "fs" / "cgroup" / controller
            group = top / path.strip("/")
            for folder in (group, *group.parents):
                if not folder.is_relative_to(top):
                    break
                if (limit := _read(folder / _LIMITS[controller]).strip()).isdecimal():
                    yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
