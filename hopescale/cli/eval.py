"""`hopescale eval`."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hopescale.checkpoint.manifest import EXPORT
from hopescale.cli.options import require_packages
from hopescale.cli.ranks import own_rank_info, run_on_ranks
from hopescale.common.errors import CheckpointError, HopescaleError
from hopescale.common.rank_info import RankInfo
from hopescale.config.layout import Layout
from hopescale.evals.request import EvalRequest

if TYPE_CHECKING:
    import torch

    from hopescale.infer.load import LoadedModel

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest: ranks meet when each has done its share of all questions."""


def evaluate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, or an export of one.")],
    tasks: Annotated[
        str, typer.Option(metavar="NAME[=SHOTS],...", help="Tasks of lm-eval, and `perplexity`: the held-out loss.")
    ] = "",
    task_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own, in YAML.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Prepared data for perplexity.", show_default="the run's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.", show_default="all")] = None,
    window: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens read at most.", show_default="all; trained length")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON to write.", show_default="RUN/evals/")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.", show_default="1")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Ask a model tasks of lm-eval, and measure its loss on held-out data; questions are dealt out to the ranks.

    Exit codes: 0 done, 2 options, 3 data or tasks, 4 model, 5 launch.
    """
    rank_info = own_rank_info(context, nproc)
    try:
        names = [name for name in tasks.split(",") if name.strip()]
        request = EvalRequest.read(names, data, task_path=task_path, limit=limit, context=window)
        if request.tasks:
            require_packages("tasks need", "eval", "lm-eval")
        if out is not None and out.exists():
            raise CheckpointError(f"output {out} already exists", "choose another file, or delete the old one first")
    except HopescaleError as error:
        error.repeated = rank_info is not None and rank_info.rank > 0
        raise
    if rank_info is None and (nproc or 1) > 1:
        run_on_ranks(context, nproc)
    _evaluate(model, request, out, rank_info, device)


def _evaluate(path: Path, request: EvalRequest, out: Path | None, rank_info: RankInfo | None, device: str) -> None:
    from hopescale.evals.report import report, report_path, table, write_report
    from hopescale.evals.run import context_of
    from hopescale.evals.run import evaluate as run
    from hopescale.parallel import process
    from hopescale.parallel.init_distributed import init_distributed

    layout = Layout(dp=1 if rank_info is None else rank_info.world_size)
    facts = {"the model": str(path.absolute()), "what is measured": repr(request), "--out": str(out)}
    mesh, chosen = init_distributed(rank_info, layout, device, "--device", facts, timeout=TIMEOUT)
    control = mesh.control
    loaded: list[LoadedModel] = []
    control.all_ranks_or_raise(lambda: loaded.append(_load(path, chosen)))
    speak = partial(typer.echo, err=True) if control.is_first else lambda line: None
    results = run(loaded[0], request, control, speak)
    if rank_info is not None:
        process.stop()
    if not control.is_first:
        return
    for line in table(results):
        typer.echo(line)
    if (file := out or report_path(loaded[0])) is not None:
        settings = {
            "limit": request.limit,
            "context": context_of(loaded[0], request),
            "data": request.data and str(request.data),
            "task_path": request.task_path and str(request.task_path),
        }
        write_report(file, report(loaded[0], results, settings))
        typer.echo(f"written to {file}")


def _load(path: Path, device: torch.device) -> LoadedModel:
    """Load a checkpoint, or an export as the same model of ours."""
    if (path / "config.json").exists() or (path / EXPORT).exists():
        require_packages("exports need", "convert", "transformers", "safetensors")
        from hopescale.convert.hf import load_export

        return load_export(path, device)
    from hopescale.infer.load import load_model

    return load_model(path, device)
