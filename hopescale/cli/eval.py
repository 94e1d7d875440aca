"""`hopescale eval`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopescale.checkpoint.manifest import EXPORT
from hopescale.cli.options import Levels, require_packages
from hopescale.cli.progress import progress_bar
from hopescale.cli.ranks import own_rank_info, run_on_ranks
from hopescale.cli.report import compare_and_write
from hopescale.common.errors import CheckpointError, ConfigError, HopescaleError
from hopescale.common.rank_info import RankInfo
from hopescale.config.layout import Layout
from hopescale.evals.request import EvalRequest
from hopescale.evals.suite_request import EXAMPLES, SuiteRequest, read_counts
from hopescale.infer.adaptation import RATE, Adaptation, read_adaptation
from hopescale.sweep.finished import expand

if TYPE_CHECKING:
    import torch

    from hopescale.infer.load import LoadedModel
    from hopescale.parallel.mesh import Mesh

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the slowest: ranks meet when each has done its share of all questions."""


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL...", help="Run folders, sweep folders, checkpoints, or exports.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAME[=SHOTS],...", help="Tasks of lm-eval, and `perplexity`: the held-out loss.")
    ] = "",
    suite: Annotated[
        str, typer.Option(metavar="NAME,...", help="Generated tasks, by name or suite: docs/suites.md.")
    ] = "",
    length: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of a suite's examples.", show_default="1, 2, 4 times trained")
    ] = "",
    pairs: Annotated[
        str, typer.Option(metavar="N,...", help="Pairs, needles, facts of a suite.", show_default="as trained")
    ] = "",
    distance: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens before a suite's question.", show_default="as trained")
    ] = "",
    task_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Tasks of your own, in YAML.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Prepared data for perplexity.", show_default="the run's")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task.", show_default=f"all; {EXAMPLES} of a suite")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--context", min=1, help="Tokens read at most.", show_default="all; trained length")
    ] = None,
    adapt: Annotated[
        str, typer.Option(metavar="NAME=TOKENS,...", help="Levels that follow what is read, with their periods.")
    ] = "",
    rate: Annotated[float | None, typer.Option(help="Learning rate of --adapt.", show_default=str(RATE))] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Levels of --adapt return when the next slower one steps.")
    ] = False,
    levels: Levels = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON to write.", show_default="RUN/evals/")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the models are put side by side.", show_default="none")
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here.", show_default="1")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Ask models tasks of lm-eval and generated suites, and measure their loss on held-out data.

    Questions are dealt out to the ranks. Several models are put side by side with --report.

    Exit codes: 0 done, 2 options, 3 data or tasks, 4 model, 5 launch.
    """
    rank_info = own_rank_info(context, nproc)
    try:
        names = [name for name in tasks.split(",") if name.strip()]
        varied = {"lengths": ("--length", length), "pairs": ("--pairs", pairs), "distances": ("--distance", distance)}
        suites = SuiteRequest(
            tuple(dict.fromkeys(name.strip() for name in suite.split(",") if name.strip())),
            **{name: read_counts(*given) for name, given in varied.items()},
            examples=limit or EXAMPLES,
        )
        settings = {"task_path": task_path, "limit": limit, "context": window, "suite": suites}
        settings["adaptation"] = _adaptation(adapt, rate, nested)
        request = EvalRequest.read(names, data, **settings)
        if request.tasks:
            require_packages("tasks need", "eval", "lm-eval")
        if out is not None and out.exists():
            raise CheckpointError(f"output {out} already exists", "choose another file, or delete the old one first")
        models = expand(models)
        if len(models) > 1 and out is not None:
            raise ConfigError(f"--out {out} is one file, but there are {len(models)} models", "use --report FOLDER")
    except HopescaleError as error:
        error.repeated = rank_info is not None and rank_info.rank > 0
        raise
    if rank_info is None and (nproc or 1) > 1:
        run_on_ranks(context, nproc)
    bodies = _evaluate(models, request, out, rank_info, device, levels)
    if report is not None and bodies:
        compare_and_write(bodies, report)


def _adaptation(adapt: str, rate: float | None, nested: bool) -> Adaptation | None:
    """Read the options for levels that follow the text."""
    if adapt:
        return read_adaptation("--adapt", adapt, rate=rate, nested=nested)
    if rate is not None or nested:
        raise ConfigError("--rate and --nested have no effect without --adapt", "name levels: --adapt fast=512")
    return None


def _evaluate(
    paths: Sequence[Path],
    request: EvalRequest,
    out: Path | None,
    rank_info: RankInfo | None,
    device: str,
    levels: Path | None,
) -> list[dict[str, Any]]:
    """Evaluate one model after the other, and return their reports, on the first rank alone."""
    from hopescale.evals.distribute import silent
    from hopescale.evals.run import evaluate as run
    from hopescale.parallel import process
    from hopescale.parallel.init_distributed import init_distributed

    layout = Layout(dp=1 if rank_info is None else rank_info.world_size)
    where = ", ".join(str(path.absolute()) for path in paths)
    facts = {"the model": where, "what is measured": repr(request), "--out": str(out), "--levels": str(levels)}
    mesh, chosen = init_distributed(rank_info, layout, device, "--device", facts, timeout=TIMEOUT)
    control, bodies = mesh.control, []
    speak = partial(typer.echo, err=True) if control.is_first else lambda line: None
    for path in paths:
        loaded: list[LoadedModel] = []
        control.all_ranks_or_raise(lambda path=path, loaded=loaded: loaded.append(load(path, chosen, levels)))
        if len(paths) > 1:
            speak(f"{path}:")
        with progress_bar("asking", unit="texts") if control.is_first else nullcontext() as bar:
            results = run(loaded[0], request, control, speak, silent if bar is None else bar.show)
        if control.is_first:
            for line in results.tables():
                typer.echo(line)
            bodies.append(_write(loaded[0], request, results, out, levels))
    if rank_info is not None:
        process.stop()
    return bodies


def _write(
    loaded: LoadedModel, request: EvalRequest, results: Any, out: Path | None, levels: Path | None
) -> dict[str, Any]:
    """Write the results of a model to its JSON file, if it has one, and return them."""
    from dataclasses import asdict

    from hopescale.evals.report import report, report_path, write_report
    from hopescale.evals.run import context_of

    settings = {
        "limit": request.limit,
        "context": context_of(loaded, request),
        "data": request.data and str(request.data),
        "task_path": request.task_path and str(request.task_path),
    }
    if request.adaptation is not None:
        settings["adapt"] = request.adaptation.describe()
    if levels is not None:
        settings["levels"] = str(levels)
    if request.suite.names:
        settings["suite"] = asdict(request.suite)
    body = report(loaded, results, settings)
    if (file := out or report_path(loaded)) is not None:
        write_report(file, body)
        typer.echo(f"written to {file}")
    return body


def load(path: Path, device: torch.device, levels: Path | None = None, *, mesh: Mesh | None = None) -> LoadedModel:
    """Load a checkpoint, or an export as the same model of ours, with the `levels` of a folder in place of its own.

    With a `mesh`, tensor-parallel ranks hold parts of the model; levels are not put in place there.
    """
    loaded = _load(path, device, mesh)
    if levels is not None:
        from hopescale.infer.level_state import put_levels

        put_levels(levels, loaded)
    return loaded


def is_export(path: Path) -> bool:
    """Tell whether a folder is one of transformers, and not a checkpoint or a run folder."""
    return (path / "config.json").exists() or (path / EXPORT).exists()


def _load(path: Path, device: torch.device, mesh: Mesh | None) -> LoadedModel:
    if is_export(path):
        require_packages("exports need", "convert", "transformers", "safetensors")
        from hopescale.convert.hf import load_export

        return load_export(path, device, mesh)
    from hopescale.infer.load import load_model

    return load_model(path, device, mesh)
