"""Verbs that run on several ranks: which one this process is, and how the others are started here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

import typer

from hopescale.common.errors import ConfigError
from hopescale.common.rank_info import RankInfo
from hopescale.launch.environment import find_rank_info
from hopescale.launch.local import run_local


def own_rank_info(context: typer.Context, nproc: int | None) -> RankInfo | None:
    """Return which rank a launcher has made this process, and note it for `main`; None if it was started alone.

    Raises:
        ConfigError: If it is one of several, and `--nproc` asks for more.
        LaunchError: If the launcher's variables make no sense.
    """
    rank_info = find_rank_info(os.environ)
    if rank_info is not None:
        context.obj["rank"] = rank_info.rank
        if nproc is not None:
            message = f"--nproc {nproc}, but this is already rank {rank_info.rank} of {rank_info.world_size}"
            raise ConfigError(message, "leave --nproc out under torchrun and srun")
    return rank_info


def run_on_ranks(context: typer.Context, num_ranks: int) -> None:
    """Run the same command on ranks of this machine, and exit as they do."""
    command = [sys.executable, "-m", "hopescale", *without_nproc(context.obj["args"])]
    say = partial(typer.echo, err=True)
    raise typer.Exit(run_local(command, num_ranks, environ=os.environ, report=say, relay=say))


def without_nproc(args: Sequence[str]) -> list[str]:
    """Return arguments of `hopescale` without the option `--nproc` and its value."""
    kept, rest = [], iter(args)
    for arg in rest:
        if arg == "--":
            return [*kept, arg, *rest]
        if arg == "--nproc":
            next(rest)
        elif not arg.startswith("--nproc="):
            kept.append(arg)
    return kept
