"""Arguments, options and ways to print that several verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hopescale.common.errors import ConfigError
from hopescale.common.units import parse_count

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Levels = Annotated[
    Path | None, typer.Option("--levels", metavar="FOLDER", help="Levels that `hopescale adapt` has kept.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")]


def read_count(option: str, text: str) -> int:
    """Read the value of an option as a positive count.

    Raises:
        typer.BadParameter: If it is none.
    """
    try:
        value = parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None
    if value < 1:
        raise typer.BadParameter(f"{text} is not positive", param_hint=option)
    return value


def echo_rows(rows: Mapping[str, object], *, indent: str = "") -> None:
    """Print names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        typer.echo(f"{indent}{name:<{width}}  {value}")


def require_packages(needs: str, extra: str, *packages: str) -> None:
    """Raise a ConfigError with the packages of an extra of ours that are missing: `convert needs transformers`."""
    if missing := [package for package in packages if find_spec(package.replace("-", "_")) is None]:
        raise ConfigError(f"{needs} {', '.join(missing)}", f"pip install 'hopescale[{extra}]'")
