"""`hopescale plan`: what a run costs, before it is started. Imports no torch."""

from __future__ import annotations

import json as to_json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hopescale.cli import plan_view as view
from hopescale.cli.options import Overrides, Recipe, read_count
from hopescale.common.errors import ConfigError
from hopescale.config.check import check_layout, require_valid
from hopescale.config.layout import make_layout, smallest_layout
from hopescale.config.load import LoadedConfig, load_recipe
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import choose_micro_batch, with_micro_batch
from hopescale.cost.estimate import Estimator
from hopescale.cost.hardware import Device, planned_device, trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.report import make_report
from hopescale.cost.search import MOST_RANKS, best_choices
from hopescale.scaling.law import read_doubt, read_law
from hopescale.scaling.sizes import best_size

Name = Literal["A100", "H100", "H200", "B200", "cpu"]


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=MOST_RANKS, help="Devices in all.", show_default="the fewest it runs on")
    ] = None,
    device: Annotated[Name | None, typer.Option(help="What each rank computes on.", show_default="H100")] = None,
    search: Annotated[bool, typer.Option("--search", help="Propose layout, micro batch and recomputation.")] = False,
    flops: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Training FLOPs to spend: propose the best size. With --law.")
    ] = None,
    law: Annotated[
        str | None, typer.Option(metavar="FILE[:SERIES]", help="A fitted scaling law (`hopescale sweep fit`).")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1.0, help="Part of the peak that large products reach.", show_default="the device's"
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print all numbers as JSON, in bytes, seconds and FLOPs.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the memory of each stage.")] = None,
) -> None:
    """Say what a run costs: parameters, FLOPs, memory, bytes sent, and an estimate of its time.

    Exit codes: 0 it fits, 2 it does not, or --search finds nothing that does, or the config is wrong.
    """
    if (flops is None) != (law is None):
        raise ConfigError(
            "--flops and --law go together: the law says which size is best for so many FLOPs",
            "give both; `hopescale sweep fit` writes a law",
        )
    of_a_run = {"--gpus": gpus, "--device": device, "--search": search or None, "--efficiency": efficiency}
    given = {"--plot": plot, **(of_a_run if flops is not None else {})} if flops is not None or search else {}
    if idle := [option for option, value in given.items() if value is not None]:
        beside = "--search" if flops is None else "--flops, which asks of no devices"
        raise ConfigError(f"{', '.join(idle)}: no effect beside {beside}", "leave it out")
    if flops is not None:
        _show_size(recipe, overrides or [], read_count("--flops", flops), law, json)
        return
    loaded = require_valid(load_recipe(recipe, overrides or ()))
    ranks = gpus or smallest_layout(loaded.config).num_ranks
    loaded = replace(loaded, config=trained_on(loaded.config, device or "H100"))
    if search:
        loaded = _freed(loaded)
    planned = planned_device(device or "H100", ranks)
    if loaded.config.train.micro_batch_size == "auto":
        loaded = replace(loaded, config=_with_largest(loaded, ranks, planned, search=search))
    holdings = Holdings(loaded.config)
    estimator = Estimator(holdings, planned, efficiency)
    if search:
        found = [choice.numbers() for choice in best_choices(estimator, ranks)]
        typer.echo(to_json.dumps(found, indent=2) if json else view.choices(found, estimator, ranks), nl=json)
        raise typer.Exit(0 if found else ConfigError.exit_code)
    layout = make_layout(loaded.config, ranks)
    check_layout(loaded.config, layout, loaded.origins)
    report = make_report(estimator, layout)
    if plot is not None:
        view.draw_memory(report, plot)
    typer.echo(to_json.dumps(report, indent=2) if json else view.report(report), nl=json)
    raise typer.Exit(0 if report["memory"]["fits"] else ConfigError.exit_code)


def _with_largest(loaded: LoadedConfig, ranks: int, device: Device, *, search: bool) -> RunConfig:
    """Return the config with the largest micro batch that fits; with one sequence where none does, as the plan says."""
    config = with_micro_batch(loaded.config, 1)
    if search:
        return config
    layout = make_layout(config, ranks)
    check_layout(config, layout, loaded.origins)
    try:
        return with_micro_batch(config, choose_micro_batch(config, layout, device.name, device.memory).size)
    except ConfigError:
        return config


def _freed(loaded: LoadedConfig) -> LoadedConfig:
    """Leave the degrees open that a search chooses."""
    parallel = replace(
        loaded.config.parallel, dp=None, tp=1, pp=1, virtual_stages=1, sequence_parallel=False, zero=0, shard=None
    )
    return replace(loaded, config=replace(loaded.config, parallel=parallel))


def _show_size(recipe: str, overrides: list[str], flops: int, law: str, json: bool) -> None:
    path, series = Path(law), None
    if not path.exists() and ":" in law:
        name, series = law.rsplit(":", 1)
        path = Path(name)
    found: dict[str, Any] = best_size(recipe, overrides, flops, read_law(path, series))
    found["doubt"] = read_doubt(path, series)
    typer.echo(to_json.dumps(found, indent=2) if json else view.size(found, recipe), nl=json)
