"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

from hopescale.common.units import parse_count

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
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
