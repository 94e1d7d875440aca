"""Where the package keeps what it ships, and how paths are shown to people."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_recipes() -> Path:
    """Return the folder of shipped recipes: inside an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def display_path(path: Path) -> str:
    """Write a path relative to the working directory where it lies below it, else absolute."""
    absolute = path.resolve()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except ValueError:
        return str(absolute)
