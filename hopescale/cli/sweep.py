"""`hopescale sweep`: many runs planned, run and collected as one, and the law fitted to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopescale.cli import trials
from hopescale.common.errors import ConfigError

if TYPE_CHECKING:
    from hopescale.scaling.analysis import Analysis

app = typer.Typer(help="Plan and run many trials, fit laws to their losses, draw them.", no_args_is_help=True)
for verb in (trials.plan, trials.run, trials.status, trials.collect):
    app.command()(verb)

Folder = Annotated[Path | None, typer.Argument(metavar="SWEEP", help="A sweep's folder, with its points.csv.")]
PointsFile = Annotated[
    Path | None, typer.Option("--points", metavar="FILE", help="Any table of runs instead: N, D or FLOP, and loss.")
]
SeriesColumn = Annotated[
    str | None,
    typer.Option("--series", metavar="COLUMN", help="Column that tells series apart.", show_default="series"),
]
DropHighest = Annotated[int, typer.Option(metavar="K", min=0, help="Leave out the K runs of highest loss.")]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="SERIES", help="Series that others are compared with.", show_default="transformer, else first"
    ),
]
Resamples = Annotated[int, typer.Option(metavar="N", min=0, help="Repeated fits for the intervals; 0 for none.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write to.", show_default="SWEEP")]


@app.command()
def fit(
    sweep: Folder = None,
    points: PointsFile = None,
    series: SeriesColumn = None,
    drop_highest: DropHighest = 0,
    reference: Reference = None,
    resamples: Resamples = 200,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as JSON.")] = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to every series of a table of runs; write law.json."""
    from hopescale.scaling.summary import describe, to_json

    analysis = _analyse(sweep, points, series, drop_highest, reference, resamples)
    content = json.dumps(to_json(analysis), indent=2)
    typer.echo(content if as_json else "\n".join(describe(analysis)))
    folder = out or sweep
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "law.json").write_text(content + "\n")
        if not as_json:
            typer.echo(f"\nlaw: {folder / 'law.json'}")


def _analyse(
    sweep: Path | None,
    points: Path | None,
    series: str | None,
    drop_highest: int,
    reference: str | None,
    resamples: int,
) -> Analysis:
    """Read the table that was named one way or the other, and fit it."""
    if (sweep is None) == (points is None):
        raise ConfigError("name a sweep's folder or a table of runs, one of both", "as in: sweep fit --points runs.csv")
    from hopescale.scaling.analysis import analyse
    from hopescale.scaling.points import read_points

    table = points or sweep / "points.csv"
    if sweep and not table.is_file():
        raise ConfigError(f"{sweep} has no points.csv", f"collect the trials first: hopescale sweep collect {sweep}")
    return analyse(read_points(table, series, drop_highest), reference, resamples)
