"""`hopescale sweep rollout` and `rates`: what a table says of its own laws and rates. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hopescale.cli.laws import AsJson, Asymptote, DropHighest, LossColumn, PointsFile, SeriesColumn, SweepOrFolder
from hopescale.cli.laws import find_table as _find_table
from hopescale.common.errors import DataError


def rollout(
    sweep: SweepOrFolder = None,
    points: PointsFile = None,
    series: SeriesColumn = None,
    loss: LossColumn = None,
    drop_highest: DropHighest = 0,
    asymptote: Asymptote = None,
    as_json: AsJson = False,
) -> None:
    """Fit laws up to every cutoff in size and in compute, predict the larger runs, and compare the forms by that."""
    from hopescale.scaling.points import read_points
    from hopescale.scaling.rollout import describe_rollouts, rollouts, rollouts_json

    table, _ = _find_table(sweep, points)
    found = {}
    for name, runs in read_points(table, series, drop_highest, loss).series.items():
        try:
            found[name] = rollouts(runs, asymptote)
        except DataError as error:
            raise DataError(f"series {name}: {error.message}", error.hint) from None
    if as_json:
        typer.echo(json.dumps({name: rollouts_json(of_series) for name, of_series in found.items()}, indent=2))
        return
    for name, of_series in found.items():
        typer.echo("\n".join([f"{name}:", *(f"  {line}" for line in describe_rollouts(of_series))]))


def rates(
    sweep: SweepOrFolder = None,
    points: PointsFile = None,
    series: SeriesColumn = None,
    loss: LossColumn = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Rates hold for every size (model.transfer): a law without N.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the best learning rate and batch of every series, write them as rules, and name undertuned runs."""
    from hopescale.scaling.points import read_points
    from hopescale.scaling.rates import describe_rates, rates_json, rates_of

    table = read_points(_find_table(sweep, points)[0], series, 0, loss)
    found = rates_of(table, transfer=transfer)
    if as_json:
        typer.echo(json.dumps({name: rates_json(law) for name, (_, law) in found.items()}, indent=2))
        return
    for name, (runs, law) in found.items():
        typer.echo("\n".join(describe_rates(name, runs, law, table.series[name])))
