"""`hopescale jobs`: how runs stand, from their folders and what Slurm says; and ending them, or starting them again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.options import echo_rows
from hopescale.common.errors import LaunchError
from hopescale.common.paths import display_path
from hopescale.common.units import format_count, format_duration, plural
from hopescale.launch.ledger import copied_from, entries, submit_again, submitting
from hopescale.launch.scheduler import Slurm
from hopescale.launch.status import JobStatus, elements_of_array, find_runs, run_status
from hopescale.observe.run_status import DONE, WAITING

app = typer.Typer(help="List, follow, end and restart runs.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of an array.")]

_POLL_S = 1.0
_LOOK_S = 15.0


@app.command("list")
def list_(root: Annotated[Path, typer.Argument(metavar="[ROOT]", help="Folder to search.")] = Path("runs")) -> None:
    """List the runs below a folder."""
    slurm, runs = Slurm(), find_runs(root)
    if not runs:
        typer.echo(f"no runs in {root}")
        return
    _echo_table([(display_path(run), run_status(run, slurm)) for run in runs])


@app.command()
def status(run: Run) -> None:
    """Show how a run stands, or every element of an array."""
    slurm, elements = Slurm(), elements_of_array(run)
    if elements:
        _echo_table([(name, run_status(folder, slurm)) for name, folder in elements.items()])
        return
    echo_rows(_details(run_status(_run(run), slurm)))


@app.command()
def logs(
    context: typer.Context,
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written until the job ends.")] = (
        False
    ),
    rank: Annotated[int | None, typer.Option(min=0, help="Only lines of this rank.")] = None,
    lines: Annotated[int, typer.Option(min=0, help="Lines to begin with.")] = 40,
) -> None:
    """Show the end of the log of a run's last job, or of the one whose turn it is in a chain."""
    if elements_of_array(_run(run)):
        raise LaunchError(f"{run} is the folder of an array", "name the run folder of one element")
    entry = run_status(run, Slurm()).entry
    if entry is None:
        raise _not_submitted(run, "its lines went to whoever started it")
    log = Path(entry.log)
    if not log.exists() and not follow:
        raise LaunchError(f"there is no log yet: {log}", f"`hopescale jobs status {run}` says why")
    console = context.obj["console"]
    for line in _tail(log, rank, lines, (lambda: not console.is_unread and _goes_on(run)) if follow else None):
        typer.echo(line, nl=False)


@app.command()
def cancel(run: Run) -> None:
    """End the jobs of a run for good, or of all elements of an array; a checkpoint stays as it is."""
    slurm, ended = Slurm(), []
    if not entries(_run(run)) and copied_from(run):
        raise _not_submitted(run, "")
    for id in dict.fromkeys(entry.job for entry in reversed(entries(run))):  # none of a chain is to begin
        if any(job.live is not False for job in ([slurm.job(id)] if "_" in id else slurm.jobs(id))):
            slurm.cancel(id)
            ended.append(id)
    typer.echo(f"cancelled {', '.join(ended)}" if ended else f"{run} has no job that waits or runs")


@app.command()
def requeue(run: Run) -> None:
    """Have a run save, stop and start again; submit it again if its job has ended."""
    if elements_of_array(_run(run)):
        raise LaunchError(f"{run} is the folder of an array", "name the run folder of one element")
    with submitting(run):
        _requeue(run, Slurm())


def _requeue(run: Path, slurm: Slurm) -> None:
    now = run_status(run, slurm)
    if now.entry is None:
        raise _not_submitted(run, "submit it with `hopescale submit`")
    if now.state == DONE:
        raise LaunchError(f"{run} is done", "to train on, submit it with more train.steps")
    if now.state == WAITING:
        typer.echo(f"job {now.entry.job} is waiting already: {now.reason or now.job.state}")
    elif now.job is not None and now.job.live is None:
        raise LaunchError(now.reason or "Slurm cannot be asked", "try again later")
    elif now.job is not None and now.job.live:
        if not slurm.has_ranks(now.entry.job):
            message = f"job {now.entry.job} has not started its ranks yet: there is nothing to save"
            raise LaunchError(message, f"wait for them, or end it with `hopescale jobs cancel {run}`")
        slurm.ask_to_stop(now.entry.job)
        typer.echo(f"job {now.entry.job} was told to save and stop; it goes back into the queue")
    else:
        again = submit_again(run, now.entry, slurm)
        typer.echo(f"job {again.job}, log {display_path(Path(again.log))}")


def _not_submitted(run: Path, hint: str) -> LaunchError:
    if other := copied_from(run):
        message = f"{run} is a copy of {other}: the jobs that its jobs.jsonl names are of that one"
        return LaunchError(message, f"name that folder, or `hopescale submit --run-dir {run}` for a job of its own")
    return LaunchError(f"{run} has no jobs.jsonl that names a job: it was not submitted", hint)


def _run(folder: Path) -> Path:
    if not folder.is_dir():
        raise LaunchError(f"there is no run folder {folder}", "`hopescale jobs list` shows what there is")
    return folder


def _goes_on(run: Path) -> bool:
    job = run_status(run, Slurm()).job
    return job is not None and job.live is not False


def _tail(log: Path, rank: int | None, count: int, goes_on) -> Iterator[str]:
    """Yield the last lines of a log, then new lines for as long as `goes_on` returns true."""
    while not log.exists() and goes_on is not None and goes_on():
        time.sleep(_LOOK_S)
    if not log.exists():
        return
    with log.open(errors="replace") as stream:
        found = [line for line in stream if _is_of(line, rank)]
        yield from found[len(found) - min(count, len(found)) :]
        looked, last = time.monotonic(), goes_on is None
        while not last:
            if time.monotonic() - looked > _LOOK_S:
                looked, last = time.monotonic(), not goes_on()
            if added := [line for line in stream.readlines() if _is_of(line, rank)]:
                yield from added
            elif not last:
                time.sleep(_POLL_S)


def _is_of(line: str, rank: int | None) -> bool:
    """Tell whether srun has marked a line as a rank's: `3: step 20/60 ...`, padded to the width of the last rank."""
    label = line.partition(":")[0].strip()
    return rank is None or (label.isdigit() and int(label) == rank)


def _echo_table(rows: Sequence[tuple[str, JobStatus]]) -> None:
    lines = [{"run": name, **_cells(status)} for name, status in rows]
    table = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def _cells(status: JobStatus) -> dict[str, str]:
    """Return the cells of a run's row; an empty text stands for an unknown value."""
    job = status.job
    return {
        "state": status.state,
        "step": "" if status.step is None else f"{status.step}/{status.steps or '?'}",
        "tokens": "" if status.tokens is None else format_count(status.tokens),
        "loss": "" if status.loss is None else f"{status.loss:.4f}",
        "tokens/s": "" if status.tps is None else format_count(status.tps),
        "eta": "" if status.eta_s is None else format_duration(status.eta_s),
        "restarts": "" if job is None or job.restarts is None else str(job.restarts),
        "job": status.entry.job if status.entry else "",
        "reason": status.reason or "",
    }


def _details(status: JobStatus) -> dict[str, str]:
    """Return all known facts about a run, by title."""
    job, entry = status.job, status.entry
    rows = _cells(status) | {
        "checkpoint": status.checkpoint or "",
        "failures": f"{status.failures} without a newer checkpoint" if status.failures else "",
        "nodes": (job and job.nodes) or "",
        "start": (job and job.start) or "",
        "exit code": (job and job.exit_code) or "",
        "cluster": f"{entry.cluster}, {plural(entry.nodes, 'node')}, {plural(entry.ranks, 'rank')}" if entry else "",
        "submitted": entry.submitted if entry else "",
        "log": display_path(Path(entry.log)) if entry else "",
    }
    return {name: value for name, value in rows.items() if value}
