"""`hopescale submit`. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.options import Overrides, Recipe
from hopescale.common.errors import LaunchError
from hopescale.common.paths import display_path
from hopescale.config.check import check_layout, require_valid
from hopescale.config.layout import make_layout
from hopescale.config.load import load_recipe
from hopescale.launch.ledger import submitting
from hopescale.launch.profile import load_profile
from hopescale.launch.sbatch import BatchJob, render
from hopescale.launch.scheduler import Slurm
from hopescale.launch.submit import (
    check_inputs,
    check_job,
    expected_start,
    log_of,
    write_run,
)
from hopescale.launch.submit import submit as submit_script


def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    cluster: Annotated[str, typer.Option(help="A profile of a cluster: a file, or the name of a shipped one.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    time: Annotated[str | None, typer.Option(help="Time limit, as of sbatch.", show_default="the profile's")] = None,
    chain: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Submit N jobs, each to go on after the one before; none is requeued."),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")] = None,
    skip_data_check: Annotated[
        bool, typer.Option("--skip-data-check", help="Do not open the data, which only the nodes see.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the script; write nothing.")] = False,
) -> None:
    """Train a recipe as a job of Slurm, or continue its run; leave as soon as the job is in the queue.

    The job is put back into the queue until the run is done: after a time limit, a preemption, a lost node or a crash.
    """
    profile, slurm = load_profile(cluster), Slurm()
    local = [f"data.staged={profile.local_disk}"] if profile.local_disk else []
    overrides = [*local, *(overrides or ())]
    loaded = require_valid(load_recipe(recipe, overrides))
    layout = make_layout(loaded.config, nodes * profile.ranks)
    check_layout(loaded.config, layout, loaded.origins)
    folder = (run_dir or Path("runs") / loaded.config.name).absolute()
    job = BatchJob(
        loaded.config.name,
        profile,
        nodes,
        run_dir=folder,
        work_dir=Path.cwd(),
        python=sys.executable,
        time=time,
        chained=chain is not None,
        staged=loaded.config.data.staged is not None,
    )
    check_job(job, loaded, slurm)
    if expected := check_inputs(job, loaded, layout, open_data=not skip_data_check):
        typer.echo(expected, err=True)
    if dry_run:
        typer.echo(render(job), nl=False)
        try:
            typer.echo(f"not submitted; expected {expected_start(job, slurm)}", err=True)
        except LaunchError as error:
            typer.echo(f"not submitted; when it would start is not known: {error.message}", err=True)
        return
    with submitting(folder):
        check_job(job, loaded, slurm := Slurm(), held=True)  # again: nobody else submits from now on
        script = write_run(job, loaded, layout, overrides)
        ids = submit_script(job, script, slurm, jobs=chain or 1)
    for id in ids:
        typer.echo(f"job {id}, log {display_path(log_of(job, id))}")
