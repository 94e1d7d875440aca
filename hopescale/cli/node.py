"""`hopescale node`: what a job does on its nodes before the ranks start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.options import Overrides, Recipe
from hopescale.cli.progress import progress_bar
from hopescale.common.errors import ConfigError, LaunchError, StoppedEarly
from hopescale.common.units import format_bytes
from hopescale.config.load import load_recipe
from hopescale.config.show import config_facts
from hopescale.launch.environment import find_node, find_nodes, find_rank_info

app = typer.Typer(help="Prepare and check the nodes of a job; started by its script.", no_args_is_help=True)


@app.command()
def stage(recipe: Recipe, overrides: Overrides = None) -> None:
    """Copy a recipe's data sets to `data.staged` on this node, checked against their checksums; one process a node."""
    data = load_recipe(recipe, overrides or ()).config.data
    if data.staged is None:
        raise ConfigError("data.staged is null: nowhere to copy to", "set it to a folder on the node's own disk")
    from hopescale.data.staged import stage as copy

    node = find_node(os.environ)
    for name, source in data.sources.items():
        if source.path is not None:
            with progress_bar(f"copying {name}") as bar:
                done = copy(source.path, data.staged, bar.advance_of)
            size, kept = format_bytes(done.num_bytes), f", {done.kept} there and right" if done.kept else ""
            typer.echo(f"{node}: {name}: {done.copied} shards copied ({size}){kept}, in {done.folder}")


@app.command()
def check(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")] = None,
    drain: Annotated[
        bool, typer.Option("--drain", help="Exit with 75 if a node is bad, and have the run avoid it.")
    ] = False,
) -> None:
    """Check device, disks and links of all nodes of a job; started as the ranks of `hopescale train` are.

    Bad nodes are named. With --drain they are also written to `bad_nodes` of the run folder, for its script to leave
    out at the next start.
    """
    rank_info = find_rank_info(os.environ)
    rank = context.obj["rank"] = rank_info.rank if rank_info else 0
    config = load_recipe(recipe, overrides or ()).config
    folder = run_dir or Path("runs") / config.name
    from hopescale.data.staged import folder_of_copies
    from hopescale.train.preflight import check_nodes, exclude

    staged = config.data.staged
    folders = [folder] if staged is None else [folder, folder_of_copies(staged)]
    node, nodes = find_node(os.environ), find_nodes(os.environ)
    try:
        facts = {"the run folder": str(folder.absolute()), **config_facts(config)}
        verdict = check_nodes(rank_info, node, nodes, config.train.device, folders, facts)
    except LaunchError as error:
        if drain:
            raise
        typer.echo(f"check of nodes: {error.message}")
        return
    lines = [f"bad node {node}: {reason}" for node, reason in verdict.bad.items()]
    lines += [f"check of nodes: {trouble}" for trouble in verdict.shared]
    if rank == 0:
        typer.echo("\n".join(lines or [f"check of nodes: all good: {verdict.summary}"]))
    if drain and verdict.bad:
        # A node that cannot be trusted may not be able to write there.
        trusted = next((other for other in nodes if other not in verdict.bad), node)
        if node == trusted and (rank_info is None or rank_info.local_rank == 0):
            exclude(folder, list(verdict.bad))
        raise StoppedEarly(f"bad nodes: {', '.join(verdict.bad)}", "the job's next start leaves them out")
    if drain and verdict.shared:
        raise LaunchError("the check of nodes failed on no single node", "see the lines above")
