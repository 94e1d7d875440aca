"""`hopescale node`: what a job does on its nodes before the ranks start."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from hopescale.common.errors import ConfigError
from hopescale.common.units import format_bytes
from hopescale.config.load import load_recipe

app = typer.Typer(help="Prepare and check the nodes of a job; started by its script.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")]


@app.command()
def stage(recipe: Recipe, overrides: Overrides = None) -> None:
    """Copy a recipe's data sets to `data.staged` on this node, checked against their checksums; one process a node."""
    data = load_recipe(recipe, overrides or ()).config.data
    if data.staged is None:
        raise ConfigError("data.staged is null: nowhere to copy to", "set it to a folder on the node's own disk")
    from hopescale.data.staged import stage as copy

    node = os.uname().nodename
    for name, source in data.sources.items():
        if source.path is not None:
            done = copy(source.path, data.staged)
            size, kept = format_bytes(done.num_bytes), f", {done.kept} there and right" if done.kept else ""
            typer.echo(f"{node}: {name}: {done.copied} shards copied ({size}){kept}, in {done.folder}")
