"""`hopescale train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopescale.config.check import require_valid
from hopescale.config.load import load_recipe
from hopescale.config.plan import make_plan
from hopescale.cost.params import count_params
from hopescale.train.stop import StopRequest


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, must, or a checkpoint's path.")] = "auto",
    stop_at: Annotated[int | None, typer.Option(help="Save and stop after this step; the schedule stays.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan; train nothing.")] = False,
) -> None:
    """Train a recipe, or continue its run.

    Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 run folder, 6 diverged, 75 stopped early and resumable.
    """
    loaded = require_valid(load_recipe(recipe, overrides or ()))
    folder = run_dir or Path("runs") / loaded.config.name
    if dry_run:
        for name, value in {"run_dir": folder, **make_plan(loaded.config).to_dict()}.items():
            typer.echo(f"{name}: {value}")
        for part, count in count_params(loaded.config.model).items():
            typer.echo(f"parameters/{part}: {count:,}")
        return

    which = resume if resume in ("auto", "never", "must") else Path(resume)
    with StopRequest() as stop:
        from hopescale.train.worker import train as run

        run(loaded, overrides or (), folder, stop=stop, resume=which, stop_at=stop_at, report=typer.echo)
