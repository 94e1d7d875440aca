"""`hopescale adapt`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopescale.checkpoint.manifest import EXPORT, MANIFEST, read_manifest
from hopescale.cli.eval import is_export, load
from hopescale.cli.options import read_count
from hopescale.cli.progress import progress_bar
from hopescale.cli.ranks import own_rank_info, run_on_ranks
from hopescale.common.errors import CheckpointError, ConfigError, HopescaleError
from hopescale.config.check_model import linear_attention
from hopescale.config.check_parallel import tensor_parallel_ranks_share_evenly
from hopescale.config.layout import Layout
from hopescale.config.load import from_dict
from hopescale.config.schema import ParallelConfig
from hopescale.infer.adaptation import RATE, adaptation_of, read_adaptation

if TYPE_CHECKING:
    import torch

    from hopescale.infer.follow import StreamPass
    from hopescale.infer.load import LoadedModel
    from hopescale.parallel.control import Control
    from hopescale.parallel.mesh import Mesh

REPORT = "report.json"
"""All figures of a pass, beside its levels."""
TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others, of which the first writes the levels alone."""


def adapt(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, a checkpoint, or an export of `convert to-hf`.")
    ],
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Text to follow: a file, a folder or an address.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the levels are kept; an earlier pass goes on.")],
    levels: Annotated[
        str, typer.Option(metavar="NAME=TOKENS,...", help="Levels that follow.", show_default="update_every_tokens")
    ] = "",
    rate: Annotated[float | None, typer.Option(help="Learning rate of a step.", show_default=str(RATE))] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Levels return to the trained weights when the next slower one steps.")
    ] = False,
    parts: Annotated[int, typer.Option(min=1, help="Parts of the stream that are asked for again later.")] = 8,
    probe: Annotated[int, typer.Option(min=1, help="Tokens of a part that are asked for again.")] = 512,
    save_every: Annotated[str, typer.Option(metavar="TOKENS", help="How often the levels are kept.")] = "64Ki",
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes to start here, which split the model.", show_default="1")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Read a stream once while levels learn from it, and keep these levels apart from the weights.

    Exit codes: 0 done, 1 a loss that is no number, 2 options, 3 the stream, 4 model or levels, 5 launch.
    """
    rank_info = own_rank_info(context, nproc)
    try:
        every = read_count("--save-every", save_every)
        given = read_adaptation("--levels", levels, rate=rate, nested=nested) if levels else None
    except HopescaleError as error:
        error.repeated = rank_info is not None and rank_info.rank > 0
        raise
    if rank_info is None and (nproc or 1) > 1:
        run_on_ranks(context, nproc)
    from hopescale.infer.follow import StreamPass, read_stream
    from hopescale.parallel import process
    from hopescale.parallel.init_distributed import init_distributed

    facts = {"the model": str(checkpoint.absolute()), "the stream": stream, "--out": str(out.absolute())}
    facts |= {"what follows": repr((given, rate, nested, parts, probe, every))}
    layout = Layout(tp=1 if rank_info is None else rank_info.world_size)
    mesh, chosen = init_distributed(rank_info, layout, device, "--device", facts, timeout=TIMEOUT)
    control = mesh.control
    goes_on = control.broadcast_from_rank0(partial(_goes_on, out))
    loaded = _load_parts(checkpoint, mesh, chosen)

    def begin() -> StreamPass:
        adaptation = given or adaptation_of(loaded.config.model, rate=rate, nested=nested)
        adaptation.check(loaded.config.model)
        return StreamPass(loaded, adaptation, read_stream(stream, loaded), parts=parts, probe_tokens=probe)

    following = control.all_ranks_or_raise(begin)
    _follow(following, control, out, every, goes_on=goes_on)
    if rank_info is not None:
        process.stop()
    if control.is_first:
        typer.echo(f"levels in {out}: hopescale generate {checkpoint} --levels {out}")


def _goes_on(out: Path) -> bool:
    """Tell whether the output holds a pass to go on with; refuse a folder that holds something else."""
    from hopescale.infer.follow import has_pass

    if has_pass(out):
        return True
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"output {out} exists, and holds no levels", "choose another folder: --out")
    return False


def _load_parts(checkpoint: Path, mesh: Mesh, device: torch.device) -> LoadedModel:
    """Load this rank's part of a model, the same checkpoint on all ranks. What fails is known to all of them."""
    if not is_export(checkpoint):
        from hopescale.checkpoint.manager import find_checkpoint

        checkpoint = mesh.control.broadcast_from_rank0(partial(find_checkpoint, checkpoint))
    if mesh.tp_group.size() > 1:
        mesh.control.all_ranks_or_raise(partial(_require_split, checkpoint, mesh.tp_group.size()))
    parts = partial(load, checkpoint, device, mesh=mesh)
    if is_export(checkpoint):
        return mesh.control.all_ranks_or_raise(parts)
    try:
        return parts()
    except HopescaleError as error:
        error.repeated = not mesh.control.is_first
        raise


def _require_split(folder: Path, num_ranks: int) -> None:
    """Refuse a number of ranks over which the model of a checkpoint, or of an export, does not split evenly."""
    file = EXPORT if is_export(folder) else MANIFEST
    if not (folder / file).exists():
        return
    config = replace(from_dict(read_manifest(folder, file).config, str(folder)), parallel=ParallelConfig(tp=num_ranks))
    uneven = [*tensor_parallel_ranks_share_evenly(config, {}), *linear_attention(config, {})]
    if problems := [problem for problem in uneven if "parallel.tp" in problem.message]:
        what = "; ".join(f"{problem.key} {problem.message}" for problem in problems)
        message = f"the model of {folder} cannot be split over {num_ranks} processes: {what}"
        raise ConfigError(message, "start a number of processes that divides all of these")


def _follow(following: StreamPass, control: Control, out: Path, every: int, *, goes_on: bool) -> None:
    """Read the stream to its end; the first rank prints and writes the report."""
    from hopescale.evals.report import write_report

    if goes_on:
        following.go_on(out)
    if not control.is_first:
        following.run(out, every)
        return
    if goes_on:
        typer.echo(f"goes on after {following.position:,} of {following.size:,} tokens", err=True)
    with progress_bar("following", unit="tokens") as bar:
        following.run(out, every, lambda line: typer.echo(line, err=True), bar.show)
    for line in following.table():
        typer.echo(line)
    write_report(out / REPORT, following.report())
