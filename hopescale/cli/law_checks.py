"""`hopescale sweep rollout`, `rates` and `next`: what a table says of its laws, and lacks. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from hopescale.cli.laws import (
    AsJson,
    Asymptote,
    DropHighest,
    LossColumn,
    PointsFile,
    Reference,
    SeriesColumn,
    SweepOrFolder,
)
from hopescale.cli.laws import find_table as _find_table
from hopescale.cli.options import read_count
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


def propose_next(
    sweep: SweepOrFolder = None,
    *,
    budget: Annotated[str, typer.Option(metavar="COUNT", help="Training FLOPs to spend.")],
    question: Annotated[
        Literal["exponent", "size", "loss", "multiplier"], typer.Option(help="What the runs are to tell.")
    ] = "size",
    flops: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Budget that the question is about.", show_default="10 x the largest run"),
    ] = None,
    of: Annotated[
        str | None, typer.Option(metavar="SERIES", help="Series of the question.", show_default="not the reference")
    ] = None,
    branch: Annotated[bool, typer.Option("--branch", help="Horizons of one size are branches of its longest.")] = False,
    points: PointsFile = None,
    series: SeriesColumn = None,
    loss: LossColumn = None,
    drop_highest: DropHighest = 0,
    reference: Reference = None,
    asymptote: Asymptote = None,
    as_json: AsJson = False,
) -> None:
    """Propose the runs that would shrink the interval of a question most, within a budget."""
    from hopescale.scaling.analysis import analyse
    from hopescale.scaling.next_runs import best_settings, describe_proposal, proposal_json, propose
    from hopescale.scaling.points import read_points

    table = read_points(_find_table(sweep, points)[0], series, drop_highest, loss)
    about = None if flops is None else float(read_count("--flops", flops))
    found = propose(
        analyse(table, reference, asymptote=asymptote),
        question,
        float(read_count("--budget", budget)),
        flops=about,
        series=of,
        branch=branch,
    )
    if as_json:
        typer.echo(json.dumps(proposal_json(found), indent=2))
        return
    typer.echo("\n".join(describe_proposal(found, best_settings(table))))
