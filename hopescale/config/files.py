"""Recipe files: found by name, read as YAML, chained by `base:`. Knows nothing of the schema."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.paths import display_path, shipped_folder
from hopescale.config.yaml_numbers import refuse_odd_numbers

MAX_BASES = 2
"""Levels of `base:` below a recipe: deeper chains hide where a value comes from."""


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe: an existing path, else a shipped recipe by name, with or without `.yaml`.

    Raises:
        ConfigError: If there is no such file; lists the shipped recipes.
    """
    if path := _locate(recipe, Path()):
        return path
    names = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))
    close = difflib.get_close_matches(Path(recipe).name.removesuffix(".yaml"), names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped recipes: {', '.join(names)}"
    raise _file_error(str(recipe), "no such recipe file, and no shipped recipe of that name", hint)


def read_chain(recipe: Path) -> list[tuple[Path, dict[Any, Any]]]:
    """Read a recipe and its bases, the deepest base first, without their `base` keys; of several, later ones win.

    A base is a path relative to the file that names it, or the name of a shipped recipe.

    Raises:
        ConfigError: If a file is missing or is not a YAML mapping, or the chain is circular or too deep.
    """
    return _read_below(recipe, [])


def _read_below(path: Path, above: list[Path]) -> list[tuple[Path, dict[Any, Any]]]:
    _check_chain([*above, path])
    tree = read_yaml(path)
    chain = [entry for base in _bases(path, tree) for entry in _read_below(base, [*above, path])]
    return [*chain, (path, tree)]


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a file that holds a YAML mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: If the file cannot be read or is not a YAML mapping; names the line.
    """
    shown = display_path(path)
    try:
        refuse_odd_numbers(path.read_text(encoding="utf-8"))
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except ConfigError as error:
        raise _file_error(shown, error.message, error.hint) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise _file_error(where, error.problem or "not readable as YAML") from None
    except OSError as error:
        raise _file_error(shown, (error.strerror or str(error)).lower()) from None
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise _file_error(shown, str(error).splitlines()[0]) from None
    if not isinstance(tree, dict):
        raise _file_error(shown, "expected a mapping of keys to values, got a list")
    return tree


def _locate(recipe: str | Path, folder: Path) -> Path | None:
    shipped = shipped_folder("recipes")
    candidates = (folder / recipe, shipped / recipe, shipped / f"{recipe}.yaml")
    return next((path for path in candidates if path.is_file()), None)


def _file_error(where: str, message: str, hint: str | None = None) -> ConfigError:
    return ConfigError([Problem(where, message, hint=hint)])


def _check_chain(files: list[Path]) -> None:
    *above, last = files
    shown = " -> ".join(display_path(file) for file in files)
    if last.resolve() in [file.resolve() for file in above]:
        raise _file_error(display_path(above[-1]), f"circular base: {shown}")
    if len(above) > MAX_BASES:
        raise _file_error(display_path(above[-1]), f"more than {MAX_BASES} levels of base: {shown}")


def _bases(path: Path, tree: dict[Any, Any]) -> list[Path]:
    """Take the bases out of a file's values: one path, or a list of which later ones win."""
    named, shown = tree.pop("base", []), display_path(path)
    bases = named if isinstance(named, list) else [named]
    if not all(isinstance(base, str) for base in bases):
        raise _file_error(shown, f"base must be a path or a list of paths, got {named!r}")
    return [_base_path(path, base, shown) for base in bases]


def _base_path(path: Path, base: str, shown: str) -> Path:
    if found := _locate(base, path.parent):
        return found
    near = sorted(file.name for file in (path.parent / base).parent.glob("*.yaml"))
    hint = f"files there: {', '.join(near)}" if near else "the path is relative to the file that names it"
    raise _file_error(shown, f"base {display_path(path.parent / base)} does not exist", hint)
