"""`hopescale sweep fit` and `plot`: the law of a table of runs, fitted and drawn. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopescale.cli.options import require_packages
from hopescale.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from hopescale.scaling.analysis import Analysis

SweepOrFolder = Annotated[
    Path | None, typer.Argument(metavar="SWEEP", help="A sweep's file or its folder, with its points.csv.")
]
PointsFile = Annotated[
    Path | None, typer.Option("--points", metavar="FILE", help="Any table of runs instead: N, D or FLOP, and loss.")
]
SeriesColumn = Annotated[
    str | None,
    typer.Option("--series", metavar="COLUMN", help="Column that tells series apart.", show_default="series"),
]
LossColumn = Annotated[
    str | None,
    typer.Option("--loss", metavar="COLUMN", help="Column of the loss.", show_default="val_loss, else loss"),
]
DropHighest = Annotated[int, typer.Option(metavar="K", min=0, help="Leave out the K runs of highest loss.")]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="SERIES", help="Series that others are compared with.", show_default="transformer, else first"
    ),
]
Asymptote = Annotated[
    float | None, typer.Option(metavar="E", help="Hold E of the laws at this value.", show_default="fitted")
]
ScoreColumn = Annotated[
    str | None,
    typer.Option("--score", metavar="COLUMN", help="Column of the scores, 0 to 1.", show_default="score, if there"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print all results as JSON.")]
Resamples = Annotated[int, typer.Option(metavar="N", min=0, help="Repeated fits for the intervals; 0 for none.")]


def fit(
    sweep: SweepOrFolder = None,
    points: PointsFile = None,
    series: SeriesColumn = None,
    loss: LossColumn = None,
    drop_highest: DropHighest = 0,
    reference: Reference = None,
    resamples: Resamples = 200,
    asymptote: Asymptote = None,
    score: ScoreColumn = None,
    weigh: Annotated[
        bool, typer.Option("--weigh-undertuned", help="Let runs count less whose rates cost them loss.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where law.json goes.", show_default="SWEEP")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to every series of a table of runs; write law.json."""
    from hopescale.scaling.summary import describe, to_json

    table, folder = find_table(sweep, points)
    analysis = _analyse(table, series, loss, drop_highest, reference, resamples, asymptote, score, weigh=weigh)
    content = json.dumps(to_json(analysis), indent=2)
    typer.echo(content if as_json else "\n".join(describe(analysis)))
    if out or folder:
        path = (out or folder) / "law.json"
        _write(path, content + "\n")
        typer.echo(f"law: {path}", err=as_json)


def plot(
    sweep: SweepOrFolder = None,
    points: PointsFile = None,
    series: SeriesColumn = None,
    loss: LossColumn = None,
    drop_highest: DropHighest = 0,
    reference: Reference = None,
    resamples: Resamples = 200,
    asymptote: Asymptote = None,
    score: ScoreColumn = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write to.", show_default="SWEEP/report")
    ] = None,
) -> None:
    """Draw the runs, their laws and their comparison: PNG files, and report.html, which needs no other file."""
    table, folder = find_table(sweep, points)
    if not (out or folder):
        raise ConfigError("a table of runs has no folder for its report", "name one with --out")
    require_packages("sweep plot needs", "scaling", "matplotlib")
    from hopescale.scaling.curves import read_curves
    from hopescale.scaling.report import write_report

    analysis = _analyse(table, series, loss, drop_highest, reference, resamples, asymptote, score, need_laws=False)
    for name, one in analysis.series.items():
        if one.fit is None:
            typer.echo(f"note: series {name} has no law: {one.doubt}")
    typer.echo(f"report: {write_report(analysis, read_curves(table), out or folder / 'report')}")


def find_table(sweep: Path | None, points: Path | None) -> tuple[Path, Path | None]:
    """Return the table that was named one way or the other, and the folder of its sweep, if it has one."""
    if (sweep is None) == (points is None):
        raise ConfigError(
            "name a sweep or a table of runs, one of both", "as in: hopescale sweep fit --points runs.csv"
        )
    if points:
        return points, None
    if sweep.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"):
        raise ConfigError(f"{sweep} is a table of runs, and no sweep", f"name it so: --points {sweep}")
    from hopescale.sweep.grid import load_sweep

    folder = sweep if sweep.is_dir() else load_sweep(sweep).folder
    if not (folder / "points.csv").is_file():
        file = "SWEEP.yaml" if sweep.is_dir() else sweep
        raise DataError(f"no runs are collected in {folder}", f"run or collect them: hopescale sweep collect {file}")
    return folder / "points.csv", folder


def _analyse(
    table: Path,
    series: str | None,
    loss: str | None,
    drop_highest: int,
    reference: str | None,
    resamples: int,
    asymptote: float | None,
    score: str | None,
    *,
    need_laws: bool = True,
    weigh: bool = False,
) -> Analysis:
    from hopescale.scaling.analysis import analyse
    from hopescale.scaling.points import read_points

    points = read_points(table, series, drop_highest, loss)
    if weigh:
        from hopescale.scaling.rates import weigh_undertuned

        points, undertuned = weigh_undertuned(points)
        for name, rows in undertuned.items():
            text = ", ".join(f"row {row} ({100 * part:.2g} %)" for row, part in rows.items())
            typer.echo(f"note: {name}: undertuned, and counted less: {text or 'none'}", err=True)
    return analyse(points, reference, resamples, need_laws=need_laws, asymptote=asymptote, score_column=score)


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", "choose another folder with --out") from error
