"""Folders that the package ships, and paths as people read them."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package's own source."""


def shipped_folder(name: str) -> Path:
    """Return the folder `recipes` or `slurm`: inside an installed package, or beside it in a checkout."""
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parent / name


def display_path(path: Path) -> str:
    """Write a path relative to the working directory where it lies below it, else absolute."""
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)
