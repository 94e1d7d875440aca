"""Where the package keeps what it ships, and how paths are shown to people."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_recipes() -> Path:
    """Return the folder of shipped recipes."""
    return _shipped("recipes")


def shipped_slurm() -> Path:
    """Return the folder of templates and cluster profiles for Slurm."""
    return _shipped("slurm")


def package_folder() -> Path:
    """Return the folder of the package's own source."""
    return _PACKAGE


def _shipped(name: str) -> Path:
    """Return a shipped folder: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def display_path(path: Path) -> str:
    """Write a path relative to the working directory where it lies below it, else absolute."""
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)
