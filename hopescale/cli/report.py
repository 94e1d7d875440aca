"""`hopescale report`: finished evaluations side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from hopescale.evals.comparison import compare, read_evaluations
from hopescale.evals.comparison_report import write_comparison
from hopescale.sweep.finished import expand


def report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVALUATION...", help="JSON files of eval, or run and sweep folders with evaluations."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write to.")] = Path("report"),
) -> None:
    """Put finished evaluations side by side: report.json, report.md, and PNG figures where matplotlib is installed.

    Runs that differ in name and seeds alone are one system, with intervals over its seeds.

    Exit codes: 0 done, 3 evaluations.
    """
    compare_and_write(read_evaluations(expand(evaluations, evaluated=True)), out)


def compare_and_write(bodies: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write a comparison, and say where."""
    files = write_comparison(compare(bodies), folder)
    typer.echo(f"side by side: {', '.join(str(file) for file in files)}")
    if find_spec("matplotlib") is None:
        typer.echo("no figures: they need matplotlib (pip install 'hopescale[scaling]')", err=True)
