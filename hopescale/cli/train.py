"""`hopescale train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopescale.cli.options import Overrides, Recipe
from hopescale.cli.ranks import own_rank_info, run_on_ranks
from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.config.check import check_layout, require_valid
from hopescale.config.fields import leaves
from hopescale.config.layout import Layout, make_layout
from hopescale.config.load import LoadedConfig, load_recipe
from hopescale.config.notes import notes
from hopescale.config.plan import make_plan
from hopescale.cost.params import count_params
from hopescale.observe.run_folder import require_own
from hopescale.train.request import RunRequest
from hopescale.train.stop import StopRequest

if TYPE_CHECKING:
    from hopescale.train.device_memory import RankMemory

LOST_LINES = "console.log"
"""File in a run folder with the lines that could not be shown, as the console was lost."""


def train(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<name>")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes to start here. Not with torchrun or srun.", show_default="1"),
    ] = None,
    resume: Annotated[str, typer.Option(help="auto, never, must, or a checkpoint's path.")] = "auto",
    reset_optimizer: Annotated[
        bool, typer.Option("--reset-optimizer", help="Continue with the weights and a new optimizer, this once.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Begin a new run with the weights of this run or checkpoint.")
    ] = None,
    branch_from: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Begin a new run with the whole state of this run or checkpoint."),
    ] = None,
    stop_at: Annotated[int | None, typer.Option(help="Save and stop after this step; the schedule stays.")] = None,
    profile: Annotated[
        int | None,
        typer.Option(min=1, help="Record this many steps of the first rank in `profile/` of the run folder."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show what follows, and train nothing.")] = False,
) -> None:
    """Train a recipe, or continue its run.

    Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 run folder or launch, 6 diverged, 75 stopped early and
    resumable.
    """
    rank_info = own_rank_info(context, nproc)
    try:
        if init is not None and resume not in ("auto", "never"):
            raise ConfigError(f"--init has no effect with --resume {resume}, which continues a run", "leave one out")
        if branch_from is not None and (idle := _beside_branch(resume, init, reset_optimizer)):
            message = f"--branch-from has no effect with {idle}: a branch takes all that the checkpoint holds"
            raise ConfigError(message, "leave one out")
        loaded, layout = _checked(recipe, overrides or (), rank_info.world_size if rank_info else nproc or 1, stop_at)
    except HopescaleError as error:
        error.repeated = rank_info is not None and rank_info.rank > 0
        raise
    folder = run_dir or Path("runs") / loaded.config.name
    speaks = rank_info is None or rank_info.rank == 0
    if rank_info is None:  # others wait for rank 0, which looks when they have met
        require_own(folder, "--run-dir")
    request = RunRequest(
        loaded,
        layout,
        folder,
        overrides or (),
        resume=resume if resume in ("auto", "never", "must") else Path(resume),
        reset_optimizer=reset_optimizer,
        init=init,
        branch_from=branch_from,
        stop_at=stop_at,
        profile=profile,
    )
    if dry_run:
        if speaks:
            request = _settled(request)
            _show_plan(request.loaded, layout, folder)
            command = ["hopescale", "plan", recipe, *(overrides or ()), "--gpus", str(layout.num_ranks)]
            typer.echo(f"cost: {shlex.join(command)}")
            from hopescale.train.setup import check_start

            check_start(request, _memory(request))
        return
    if rank_info is None and layout.num_ranks > 1:
        run_on_ranks(context, layout.num_ranks)

    console = context.obj["console"]
    if speaks:
        console.keep(folder / LOST_LINES)
    with StopRequest() as stop:
        from hopescale.train.worker import train as run

        run(request, rank_info=rank_info, stop=stop, report=console.say if speaks else lambda line: None)


def _beside_branch(resume: str, init: Path | None, reset_optimizer: bool) -> str | None:
    """Return the option that says where a run begins in another way than `--branch-from`, None if there is none."""
    given = {"--resume": resume not in ("auto", "never"), "--init": init, "--reset-optimizer": reset_optimizer}
    return next((f"{name} {resume}" if name == "--resume" else name for name, value in given.items() if value), None)


def _checked(recipe: str, overrides: Sequence[str], num_ranks: int, stop_at: int | None) -> tuple[LoadedConfig, Layout]:
    """Load a recipe and find out whether so many ranks can train it."""
    loaded = require_valid(load_recipe(recipe, overrides))
    layout = make_layout(loaded.config, num_ranks)
    check_layout(loaded.config, layout, loaded.origins)
    steps = loaded.config.train.steps
    if stop_at is not None and not 0 < stop_at <= steps:
        raise ConfigError(f"--stop-at is {stop_at}, but the run has steps 1 to {steps} (train.steps)")
    return loaded, layout


def _settled(request: RunRequest) -> RunRequest:
    """Choose the micro batch if the recipe leaves it to the device, and say so."""
    if request.loaded.config.train.micro_batch_size != "auto":
        return request
    from hopescale.train.micro_batch import settle_alone

    request, chosen = settle_alone(request, _memory(request))
    typer.echo(chosen)
    return request


def _memory(request: RunRequest) -> RankMemory:
    """Return the memory that each rank can have of its device, as if all ranks ran on this machine."""
    from hopescale.parallel.device import choose_device
    from hopescale.train.device_memory import memory_of

    device = choose_device(request.loaded.config.train.device, "train.device")
    return memory_of(device, request.layout.num_ranks)


def _show_plan(loaded: LoadedConfig, layout: Layout, folder: Path) -> None:
    for name, value in {"run_dir": folder, **leaves(make_plan(loaded.config, layout).to_dict())}.items():
        typer.echo(f"{name}: {value}")
    for part, count in count_params(loaded.config.model).items():
        typer.echo(f"parameters/{part}: {count:,}")
    for note in notes(loaded.config):
        typer.echo(f"note: {note}")
