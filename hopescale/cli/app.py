"""The root of the command line: verbs, exit codes, and errors as one message. Verbs import torch only when they run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hopescale import __version__
from hopescale.cli import config, convert, data, jobs, node, sweep
from hopescale.cli.adapt import adapt
from hopescale.cli.console import Console, open_missing_streams
from hopescale.cli.eval import evaluate
from hopescale.cli.generate import generate
from hopescale.cli.plan import plan
from hopescale.cli.report import report
from hopescale.cli.serve import serve
from hopescale.cli.submit import submit
from hopescale.cli.top import top
from hopescale.cli.train import train
from hopescale.common import signals
from hopescale.common.errors import HopescaleError, StoppedEarly

KEEPING = ("train", "submit", "data", "convert", "sweep", "node", "eval", "report", "adapt")
"""Verbs that leave files: what they print is not their result."""

app = typer.Typer(
    help="Train Hope language models, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(convert.app, name="convert")
app.add_typer(node.app, name="node")
app.add_typer(sweep.app, name="sweep")
app.add_typer(jobs.app, name="jobs")
app.command()(train)
app.command()(plan)
app.command()(submit)
app.command()(top)
app.command()(generate)
app.command()(serve)
app.command("eval")(evaluate)
app.command()(adapt)
app.command()(report)


def print_version(wanted: bool) -> None:
    """Print the version and exit, before a verb is asked for."""
    if wanted:
        typer.echo(f"hopescale {__version__}")
        raise typer.Exit


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the traceback of errors.")]
Version = Annotated[
    bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
]


@app.callback()
def root(context: typer.Context, verbose: Verbose = False, version: Version = False) -> None:
    """Note the options of all commands for `main`, and for commands the state of `main`."""
    context.ensure_object(dict).update(verbose=verbose, verb=context.invoked_subcommand)
    if context.invoked_subcommand != "train":  # which has handlers of its own
        signals.release()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of its outcome: the entry point of `hopescale`.

    On several ranks, what all of them know is told by rank 0, and what one alone has met by that one. A verb goes on
    without its console; one whose result is lost with it fails.
    """
    args = sys.argv[1:] if args is None else args
    open_missing_streams()
    with Console() as console:
        shared: dict[str, Any] = {"args": list(args), "rank": 0, "console": console}
        try:
            app(args, obj=shared, prog_name="hopescale")
        except HopescaleError as error:
            _tell(error, shared)
            sys.exit(error.exit_code)
        except SystemExit:
            if console.failure is not None and shared.get("verb") not in KEEPING:
                typer.echo(f"error\n  cannot write standard output: {console.failure.strerror}", err=True)
                sys.exit(1)
            raise


def _tell(error: HopescaleError, shared: dict[str, Any]) -> None:
    rank = shared["rank"]
    if shared.get("verbose"):
        traceback.print_exception(error)
    elif rank == 0:
        shared["console"].say(str(error), err=True)
    elif not error.repeated and not isinstance(error, StoppedEarly):
        shared["console"].say("\n".join(f"[rank {rank}] {line}" for line in str(error).splitlines()), err=True)
