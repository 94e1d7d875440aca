"""`hopescale config`: recipes shown, compared, checked, and the reference of every key. Imports no torch."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from hopescale.cli.options import echo_rows
from hopescale.common.errors import ConfigError
from hopescale.common.paths import display_path
from hopescale.common.units import format_count
from hopescale.config.check import require_valid
from hopescale.config.fields import field_docs, leaves
from hopescale.config.load import load_recipe
from hopescale.config.notes import notes
from hopescale.config.plan import make_plan
from hopescale.config.show import diff as find_changes
from hopescale.config.show import format_diff
from hopescale.config.show import show as format_config
from hopescale.cost.flops import flops_per_token
from hopescale.cost.params import describe_params

app = typer.Typer(help="Show, compare and check recipes.", no_args_is_help=True)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values set last.")]


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved recipe as YAML, with the origin of every value that is not a default."""
    loaded = load_recipe(recipe, overrides or ())
    typer.echo(format_config(loaded.config, loaded.origins), nl=False)


@app.command()
def diff(recipe_a: Recipe, recipe_b: Recipe) -> None:
    """Print the keys at which two recipes differ: `key: value in A -> value in B`."""
    changes = find_changes(load_recipe(recipe_a).config, load_recipe(recipe_b).config)
    typer.echo(format_diff(changes) if changes else "no difference")


@app.command()
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe; print what follows from it, or every problem and exit with 2."""
    loaded = require_valid(load_recipe(recipe, overrides or ()))
    config = loaded.config
    typer.echo(f"ok: {display_path(loaded.recipe)}")
    rows = {
        "parameters": describe_params(config.model),
        "flops_per_token": format_count(flops_per_token(config.model, config.train.seq_len)),
        **{name: f"{value:,}" for name, value in leaves(make_plan(config).to_dict()).items() if value is not None},
    }
    echo_rows(rows, indent="  ")
    for note in notes(config):
        typer.echo(f"note: {note}")


@app.command()
def docs(prefix: Annotated[str, typer.Argument(help="Only keys that start with this.")] = "") -> None:
    """Print every key with its type, default and meaning; NAME stands for the name of an entry."""
    rows = [row for row in field_docs() if row.key.startswith(prefix)]
    if not rows:
        raise ConfigError(f"no key starts with {prefix!r}", "`hopescale config docs` lists all")
    for row in rows:
        typer.echo(f"{row.key}: {row.type} = {row.default}")
        typer.echo(textwrap.indent(textwrap.fill(row.doc, 110), "    "))
