"""Write the reference pages from the code, every command and every key of a recipe, and the tables of plans."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from plan_tables import TABLES, with_tables

from hopescale.cli.app import app
from hopescale.common import errors
from hopescale.config.fields import FieldDoc, field_docs

DOCS = Path(__file__).parents[1] / "docs"
ORIGIN = "`python tools/write_reference.py` writes this page from the code; a test compares the two."


def main() -> None:
    """Write the pages, or with `--check` name those that differ from the code and exit with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    arguments = parser.parse_args()
    pages = {"reference/commands.md": _joined(commands()), "reference/keys.md": _joined(keys())}
    pages |= {name: with_tables(name, (DOCS / name).read_text(encoding="utf-8")) for name in TABLES}
    stale = [name for name, text in pages.items() if _read(DOCS / name) != text]
    if arguments.check:
        sys.exit(f"out of date: {', '.join(stale)}; run python tools/write_reference.py" if stale else 0)
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def commands() -> Iterator[str]:
    """Yield the lines of the page on the command line."""
    yield from ("# Commands", "", ORIGIN, "")
    yield "`hopescale COMMAND --help` prints the same. Exit codes stand at the end."
    yield from _command(typer.main.get_command(app), ["hopescale"])
    yield from (
        "",
        "## Exit codes",
        "",
        "| code | class | meaning |",
        "|---|---|---|",
        "| 0 | | The command did its work. |",
    )
    family = {error.exit_code: error for error in reversed(_family(errors.HopescaleError))}
    for code, error in sorted(family.items()):
        yield f"| {code} | `{error.__name__}` | {_cell(error.__doc__.splitlines()[0])} |"
    yield "| 128 + n | | A rank of `--nproc` died with signal n, such as 137 for one that was killed. |"


def _family(base: type[errors.HopescaleError]) -> list[type[errors.HopescaleError]]:
    return [base, *(one for child in base.__subclasses__() for one in _family(child))]


def _command(command: Any, path: list[str]) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if len(path) > 1:
        yield from ("", f"{'#' * len(path)} {' '.join(path)}", "", *textwrap.wrap(" ".join(command.help.split()), 120))
    if not children:
        positional = [p for p in command.params if not p.opts[0].startswith("-")]
        words = [p.metavar or (p.name.upper() if p.required else f"[{p.name.upper()}]") for p in positional]
        yield from ("", f"    {' '.join([*path, *words])}")
    rows = [_row(p) for p in command.params if p.help and p.name != "help"]
    if rows:
        yield from ("", "| argument or option | default | meaning |", "|---|---|---|", *rows)
    for name, child in children.items():
        yield from _command(child, [*path, name])


def _row(parameter: Any) -> str:
    option = parameter.opts[0].startswith("-")
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    label = names if option else f"`{parameter.metavar or parameter.name.upper()}`"
    shown, default = parameter.show_default, parameter.default
    if isinstance(shown, str):
        default = shown
    elif callable(default) or default is None or default is False:
        default = ""
    text = "required" if parameter.required else f"`{default}`" if default != "" else ""
    return f"| {label} | {text} | {_cell(parameter.help)} |"


def keys() -> Iterator[str]:
    """Yield the lines of the page on the keys of a recipe."""
    yield from ("# Keys of a recipe", "", ORIGIN, "")
    yield "`hopescale config docs [PREFIX]` prints the same. `NAME` stands for a name that you choose."
    sections: dict[tuple[str, str], list[FieldDoc]] = {}
    for row in field_docs():
        sections.setdefault((row.key.rpartition(".")[0], row.kind), []).append(row)
    for (section, kind), rows in sections.items():
        title = f"{section or 'The run'}{f', kind {kind}' if kind else ''}"
        yield from ("", f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|")
        yield from (_key(row) for row in rows)


def _key(row: FieldDoc) -> str:
    return f"| `{row.key.rpartition('.')[2]}` | {_cell(row.type)} | `{_cell(row.default)}` | {_cell(row.doc)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
